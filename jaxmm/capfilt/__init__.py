"""CapFilt (Li et al. 2022, section 3.3): synthetic captions for web images, and a filter for both kinds of texts.

The stages, each of one shard, are in `synthetic_captions.py`, `scoring.py`, `selection.py` and `merge.py`. `stages.py`
runs them over all shards; `bootstrap.py` runs the whole procedure, training included.
"""
