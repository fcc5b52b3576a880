"""Summarise a checkpoint without reading its arrays."""

import math
from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import jax

from jaxmm.nn.transformer import TRAINING_FIELDS
from jaxmm.pretrained.family import Opened
from jaxmm.sharding import named_leaves

TRAINING = (*TRAINING_FIELDS, "positions_std", "head_init", "head_bias", "patch_dropout")
"""Fields that do not change the results of a trained model."""


def describe(opened: Opened) -> dict[str, Any]:
    """Return a summary for people and JSON.

    `parameters` counts all, `parts` those per module; `config` has dotted fields, `types` the bytes per dtype, `labels`
    their number.
    """
    parts: Counter[str] = Counter()
    for path, leaf in named_leaves(jax.eval_shape(opened.task.init, jax.random.key(0))):
        parts[part_of(path)] += math.prod(leaf.shape)
    types: Counter[str] = Counter()
    for tensor in (opened.tensors or {}).values():
        types[str(tensor.dtype)] += tensor.nbytes
    tokenizer, pixels = opened.tokenizer, getattr(opened.task, "pixels", None)
    return {
        "name": opened.name, "family": opened.family, "task": type(opened.task).__name__,
        "parameters": sum(parts.values()), "parts": dict(parts), "types": dict(types),
        "config": flat({"model": opened.task.model} | ({"pixels": pixels} if pixels else {})
                       | {"image": image_config(opened)}),
        "tokenizer": None if tokenizer is None else {
            "vocabulary": tokenizer.vocab_size, "context_length": tokenizer.context_length,
            "cleaning": tokenizer.cleaning},
        "labels": None if opened.labels is None else len(opened.labels), "notes": list(opened.notes)}


def part_of(path: str) -> str:
    """Return the module of the parameter at `path`, under its tower if there is one."""
    names = path.split("/")[:-1]
    depth = 2 if names[:1] in (["vision"], ["text"], ["answer"]) else 1
    return "/".join(names[:depth]) or path


def image_config(opened: Opened) -> dict[str, Any]:
    """Return the preprocessing of images."""
    image = opened.image
    return {name: getattr(image, name) for name in ("size", "eval_crop", "eval_resize", "interpolation")}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested dataclasses and dicts to dotted names, without the fields in `TRAINING`."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in TRAINING}
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items()
            for key, leaf in flat(inner, f"{name}.{part}".lstrip(".")).items()}
