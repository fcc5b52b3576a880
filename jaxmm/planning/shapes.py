"""A recipe without its data: the task with a vocabulary of the size to be expected, and the shapes of a batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.sharding import Mesh

from jaxmm.config import DataConfig, TrainConfig
from jaxmm.data.tokenizers import Tokenizer, make_tokenizer
from jaxmm.sharding import batch_sharding
from jaxmm.task import Task

PUBLISHED = {"clip": 49_408, "bert": 30_522, "file": 32_000}
"""Sizes of vocabularies whose files are not there: OpenAI's, BERT's, and SigLIP's for any other."""
CLASSES, ANSWERS = 1000, 10
"""Of a source that is not there: ImageNet's, VQAv2's."""


@dataclass(frozen=True)
class Bound:
    """A task as a run would have it."""

    task: Task
    assumed: tuple[str, ...]
    """What only the data would know, in words."""


def bind(config: TrainConfig) -> Bound:
    """`config.task` with what only the data knows; that is assumed, and said. Raises `ConfigError`."""
    task, assumed, tokenizer, classes = config.task, [], None, None
    if "text" in task.reads:
        tokenizer, note = _tokenizer(config.data)
        assumed += note
    if "label" in task.reads:
        classes = 2 if task.pictures == 2 else getattr(getattr(task, "model", None), "classes", None)
        if classes is None:
            classes = CLASSES
            assumed.append(f"{classes:,} classes")
    if "answers" in task.reads:
        assumed.append(f"{ANSWERS} different answers to a question at most")
    if config.init.source is not None:
        assumed.append(f"the recipe's own architecture, not that of init.from = {config.init.source!r}")
    return Bound(task.bind(image_size=config.data.image.size, classes=classes, tokenizer=tokenizer), tuple(assumed))


def _tokenizer(data: DataConfig) -> tuple[Tokenizer, list[str]]:
    """The one that `data` names where its file is there; else one with as many words, none of which are known."""
    config = data.tokenizer
    if config.file is not None and Path(config.file).exists():
        return make_tokenizer(config), []
    size = PUBLISHED.get(config.kind, config.vocab_size)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    return (Tokenizer(backend, config.context_length, pad_id=0, bos_id=1, eos_id=size - 1),
            [f"a vocabulary of {size:,}"])


def batch_shapes(task: Task, data: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a training batch on `mesh`, as `place_batch` lays it out."""
    b, side, pictures = data.batch_size, data.image.size, (task.pictures,) if task.pictures > 1 else ()
    questions = (data.questions,) if data.questions > 1 else ()
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((b, *pictures, side, side, 3), jnp.uint8), "image_id": ((b, 2), jnp.int32)}
    if "label" in task.reads:
        shapes["label"] = (b,), jnp.int32
    if "text" in task.reads:
        shapes["tokens"] = (b, *questions, data.tokenizer.context_length), jnp.int32
        shapes["text_id"] = (b, 2), jnp.int32
    if "answers" in task.reads:
        shapes["answers"] = (b, *questions, ANSWERS, data.tokenizer.answer_length), jnp.int32
        shapes["answer_weight"] = (b, *questions, ANSWERS), jnp.float32
    where = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in shapes.items()}


def resized(config: TrainConfig, batch_size: int) -> TrainConfig:
    """`config` with another batch, and as many microbatches as divide it."""
    parts = next(n for n in range(config.microbatches, 0, -1) if batch_size % n == 0)
    return replace(config, microbatches=parts, data=replace(config.data, batch_size=batch_size))
