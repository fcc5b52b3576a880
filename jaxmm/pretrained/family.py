"""One record per checkpoint format, and what the format makes of a source of weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.nn.embeddings import Resize
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.io.hub import Files
from jaxmm.pretrained.table import Row
from jaxmm.pretrained.tokenizer import Vocabulary, write_tokenizer
from jaxmm.task import Task


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as its files describe it: the task, where its arrays lie, and how it wants its images and texts."""

    task: Task
    """The objective that such a model is trained with. Its `model` is the architecture, its `pixels` normalise."""
    rows: list[Row] = field(repr=False)
    image: ImageConfig
    vocabulary: Vocabulary | None = None
    """The way texts are read; None: the model reads none, or `tokenizer` is already there."""
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    labels: tuple[str, ...] | None = None
    """Names of the classes of a classification head."""
    ignore: tuple[str, ...] = ()
    """Regular expressions of keys that hold nothing of the model."""
    notes: tuple[str, ...] = ()
    """Known traps of this checkpoint, and the values used."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """The content of a folder that a format's own library loads."""

    configs: Mapping[str, Any]
    """JSON values by file name."""
    rows: list[Row] = field(repr=False)
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of tensors that the library expects and this model does not have: zeros, such as biases."""
    weights: str = "model.safetensors"


Writer = Callable[[Task, ImageConfig, tuple[str, ...] | None, Tokenizer | None], Export]
"""Describes a task, its preprocessing, labels and tokenizer. Raises `FileError` for what the format cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint format: how it is recognised, read and written."""

    name: str
    """The name in `Opened.family`, and for `Model.save` if there is a `write`."""
    matches: Callable[[Files, Tensors], bool]
    read: Callable[[Files, Tensors], Checkpoint]
    """Describes the model. Raises `FileError` for models and settings that are not supported."""
    write: Writer | None = None
    architecture: tuple[type, ...] = (object,)
    """Types of `task.model` that `write` takes."""
    save_tokenizer: Callable[[Tokenizer, Path], None] = write_tokenizer
    """Writes a tokenizer's files into the folder."""
    resize: Resize = "bicubic-antialias"
    """Interpolation of position tables, as in the family's own library (the default is timm's)."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source of weights, ready to be read. Its arrays are still in the file."""

    name: str
    """The source as the user named it."""
    family: str
    task: Task
    image: ImageConfig
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    read: Callable[[Any], Any] = field(repr=False)
    """Parameters for a tree of `ShapeDtypeStruct`s. Raises `FileError` with everything that does not fit."""
    tensors: Tensors | None = field(default=None, repr=False)
    """The file's tensors; None for the checkpoint of a run."""
    resize: Resize = "bicubic-antialias"


def known(table: Mapping[Any, Any], value: Any, name: str) -> Any:
    """Return `table[value]`. Raises `FileError` with the field `name`, the value and what is supported."""
    if value not in table:
        raise FileError(f"{name} is {value!r}; supported are {', '.join(map(str, table))}")
    return table[value]


def differing(values: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return `name = value` for every name whose value is not the expected one."""
    return [f"{prefix}{name} = {values[name]!r}" for name, value in expected.items() if values[name] != value]


def unsupported(config: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raise `FileError` with every field of `config` that differs from `expected`, if any does."""
    if odd := differing(expected | config, expected):
        raise FileError(f"{where} asks for what is not supported: {', '.join(odd)}")
