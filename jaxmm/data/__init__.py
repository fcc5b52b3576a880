"""Data sources, decoding, augmentation, and batches that depend on the seed and the step only."""

from jaxmm.data.base import DataError, Record, Source
from jaxmm.data.sources.registry import open_source, register_source

__all__ = ["DataError", "Record", "Source", "open_source", "register_source"]
