"""CapFilt (Li et al. 2022, section 3.3): synthetic captions for pictures from the web, and a filter for both kinds.

`caption.py`, `score.py`, `select.py`, `merge.py` are the stages, each of one shard; `stages.py` runs them over all;
`bootstrap.py` is the whole procedure from nothing to a better model.
"""
