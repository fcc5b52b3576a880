"""A recipe without its data: the task with a vocabulary of the expected size, and the shapes of a batch."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from jaxmm.config import DataConfig, TrainConfig
from jaxmm.data.tokenizers import Tokenizer, make_tokenizer
from jaxmm.paths import user_path
from jaxmm.sharding import batch_sharding
from jaxmm.task import Task

VOCAB_SIZES = {"clip": 49_408, "bert": 30_522, "file": 32_000}
"""Vocabulary sizes if the file is missing: OpenAI's, BERT's, and SigLIP's for any other."""
CLASSES, ANSWERS = 1000, 10
"""Assumed classes (ImageNet's) and answers per question (VQAv2's)."""


def bind(config: TrainConfig) -> tuple[Task, tuple[str, ...]]:
    """Return `config.task`, bound to assumed properties of the data (classes, vocabulary), and messages about these.

    Raises `ConfigError`.
    """
    task, assumed, tokenizer, classes = config.task, [], None, None
    if "text" in task.reads:
        tokenizer, note = _tokenizer(config.data)
        assumed += note
    if "label" in task.reads:
        classes = task.classes
        if classes is None:
            classes = CLASSES
            assumed.append(f"{classes:,} classes")
    if "answers" in task.reads:
        assumed.append(f"{ANSWERS} different answers to a question at most")
    if config.init.source is not None:
        assumed.append(f"the recipe's own architecture, not that of init.from = {config.init.source!r}")
    size = config.data.image.size
    task = task.bind(image_size=size, classes=classes, tokenizer=tokenizer)
    return task.fit(lambda count: np.zeros((1, size, size, 3), np.uint8)), tuple(assumed)


def _tokenizer(data: DataConfig) -> tuple[Tokenizer, list[str]]:
    """Return the data's tokenizer if its file exists, else a placeholder with a vocabulary of the same size."""
    config = data.tokenizer
    if config.file is not None and user_path(config.file, "data.tokenizer.file").exists():
        return make_tokenizer(config), []
    size = VOCAB_SIZES.get(config.kind, config.vocab_size)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    return (Tokenizer(backend, config.context_length, pad_id=0, bos_id=1, eos_id=size - 1),
            [f"a vocabulary of {size:,}"])


def batch_shapes(task: Task, data: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a training batch, sharded on `mesh` as `place_batch` does."""
    b, side = data.batch_size, data.image.size
    pictures = (task.images_per_record,) if task.images_per_record > 1 else ()
    captions, questions = ((count,) if count > 1 else () for count in (data.captions, data.questions))
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((b, *pictures, side, side, 3), jnp.uint8), "image_id": ((b, 2), jnp.int32)}
    if "label" in task.reads:
        shapes["label"] = (b,), jnp.int32
    if "text" in task.reads:
        shapes["tokens"] = (b, *captions, *questions, data.tokenizer.context_length), jnp.int32
        shapes["text_id"] = (b, *captions, 2), jnp.int32
    if "answers" in task.reads:
        shapes["answers"] = (b, *questions, ANSWERS, data.tokenizer.answer_length), jnp.int32
        shapes["answer_weight"] = (b, *questions, ANSWERS), jnp.float32
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}


def with_batch_size(config: TrainConfig, batch_size: int) -> TrainConfig:
    """Return `config` with another batch size, and the most microbatches up to its own that divide it."""
    parts = next(n for n in range(config.microbatches, 0, -1) if batch_size % n == 0)
    return replace(config, microbatches=parts, data=replace(config.data, batch_size=batch_size))
