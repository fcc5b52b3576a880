"""The checker of annotations."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is a float, as PEP 484 has it."""
