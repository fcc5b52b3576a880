"""Warm start: begin training from the architecture and the parameters of a trained model."""

import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmm.config import InitConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.nn.embeddings import resize_positions, resize_text_positions
from jaxmm.pretrained.family import Opened
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.sharding import named_leaves, put_global, replicated, with_shardings
from jaxmm.task import Task
from jaxmm.validation import ConfigError


def open_start(init: InitConfig) -> Opened:
    """Return the trained model that `init` names. Raise `ConfigError`."""
    try:
        return open_checkpoint(init.source, revision=init.revision, architecture=init.architecture,
                               weights=init.weights)
    except FileError as error:
        raise ConfigError(f"init.from is {init.source!r}: {error}") from None


def adopt(task: Task, trained: Task, image_size: int) -> Task:
    """Return `task` with the architecture of `trained` (see `Task.adopt`). Raise `ConfigError` if there is none."""
    adopted = task.adopt(trained, image_size)
    if adopted is None:
        raise ConfigError(f"init.from is {type(trained).__name__!r}; expected a ViT, or a BLIP that reads or writes as "
                          f"{type(task).__name__} does")
    return adopted


def with_longer_texts(task: Task, tokenizer: Tokenizer | None, length: int) -> tuple[Task, Tokenizer | None]:
    """Return the task and the tokenizer for texts of `length` tokens. Raise `ConfigError` if the task reads none."""
    if "text" not in task.reads:
        raise ConfigError(f"init.context_length is {length}; expected None for {type(task).__name__}, which reads no "
                          "texts")
    return task.with_context_length(length), tokenizer and tokenizer.at_length(length)


def start_weights(init: InitConfig, task: Task, mesh: Mesh) -> tuple[Mapping[str, jax.Array], list[str]]:
    """Return the trained parameters for `task` by path, sharded over `mesh`, and the paths without one.

    Position tables of images are resized as the family does, those of texts linearly. Raise `ConfigError`.
    """
    opened = open_start(init)
    like = with_shardings(jax.eval_shape(opened.task.init, jax.random.key(0)), mesh)
    try:
        trained = dict(named_leaves(opened.read(like)))
    except FileError as error:
        raise ConfigError(f"init.from is {init.source!r}: {error}") from None
    skip = [re.compile(pattern) for pattern in init.skip]
    loaded, reinitialised = {}, []
    for path, leaf in named_leaves(jax.eval_shape(task.init, jax.random.key(0))):
        value = trained.get(task.trained_path(path, opened.task))
        if value is None or any(pattern.search(path) for pattern in skip):
            reinitialised.append(path)
            continue
        grid = task.position_grid(path)
        if value.shape != leaf.shape and (grid is not None or path == task.text_positions):
            table = jax.jit(lambda x: x, out_shardings=replicated(mesh))(value)
            table = (resize_text_positions(table, len(leaf)) if grid is None else
                     resize_positions(table, grid.shape, opened.resize, prefix=grid.extra))
            value = put_global(np.asarray(table), replicated(mesh))
        if value.shape != leaf.shape:
            raise ConfigError(f"init.from is {init.source!r}, whose {path} is {list(value.shape)}; expected "
                              f"{list(leaf.shape)}, or the path in init.skip")
        loaded[path] = value
    return loaded, reinitialised
