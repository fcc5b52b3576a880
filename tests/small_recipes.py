"""Recipes whose models compile in seconds: `jaxmm.load_recipe = small_recipe`."""

import dataclasses
from typing import Any

from jaxmm.config import OptimizerConfig, TokenizerConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.recipes import load_recipe

WIDTH = 32
SMALL = {TransformerConfig: {"width": WIDTH, "depth": 1, "heads": 2, "mlp_dim": WIDTH, "remat": "none"},
         MedConfig: {"context_width": WIDTH}, OptimizerConfig: {"name": "adamw"}, TokenizerConfig: {"vocab_size": 90}}
"""What is changed. Every corpus has 90 pieces of words, so that models of different corpora share programs."""
PARTS = {"task", "model", "vision", "text", "transformer", "optimizer", "data", "tokenizer"}


def small_recipe(name: str) -> Any:
    """Return a recipe with transformers of one narrow layer and a small vocabulary, trained by AdamW."""
    return _shrink(load_recipe(name))


def _shrink(part: Any) -> Any:
    if not dataclasses.is_dataclass(part):
        return part
    names = PARTS.intersection(field.name for field in dataclasses.fields(part))
    parts = {name: _shrink(getattr(part, name)) for name in names}
    return dataclasses.replace(part, **parts | SMALL.get(type(part), {}))
