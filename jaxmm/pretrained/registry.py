"""All checkpoint formats: `open_checkpoint` finds a source's format and reads it, `save_checkpoint` writes one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.paths import expand, is_bucket, is_taken, local_copy, new_folder, user_path
from jaxmm.pretrained.families import (
    native,
    npz,
    open_clip,
    salesforce,
    timm,
    transformers,
    transformers_blip,
    transformers_igpt,
)
from jaxmm.pretrained.family import Family, Opened
from jaxmm.pretrained.io.files import FileError, Tensor, Weights, open_weights, write_safetensors
from jaxmm.pretrained.io.hub import find
from jaxmm.pretrained.refusals import check_usable
from jaxmm.pretrained.table import read_params, write_tensors
from jaxmm.pretrained.tokenizer import read_tokenizer
from jaxmm.task import Task
from jaxmm.validation import ConfigError

FAMILIES: tuple[Family, ...] = (
    native.FAMILY, open_clip.FAMILY, transformers_blip.FAMILY, transformers_igpt.FAMILY, transformers.FAMILY,
    timm.FAMILY, open_clip.OPENAI, salesforce.FAMILY, npz.FAMILY)
"""Formats in the order in which they are tried: configurations first, then names of tensors."""
Format = Literal["jaxmm", "transformers", "timm", "open_clip"]
"""Names of the families that are written."""


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, tokenizer: str | Path | None = None,
    architecture: str | None = None, weights: Weights | None = None,
) -> Opened:
    """Recognise and describe `source`; see `jaxmm.load` for its kinds and the options. Raises `FileError`."""
    source = expand(source, "source")
    path = user_path(source)
    if native.is_run(path):
        if architecture is not None or weights is not None:
            raise FileError(f"{source} is a run, whose architecture and weights are known; expected None for both")
        return native.open_run(path, revision)
    files = find(local_copy(path) if is_bucket(path) else source, revision=revision)
    tensors, notes = open_weights(files.weights, weights)
    notes += check_usable(files, tensors)
    family = next((family for family in FAMILIES if family.matches(files, tensors)), None)
    if architecture is not None:
        if not open_clip.is_bare(tensors) or family is not open_clip.OPENAI:
            raise FileError(f"architecture is {architecture!r}, but {files.name} is not a CLIP of open_clip without a "
                            "configuration; expected None")
        family = replace(family, read=lambda files, tensors: open_clip.read_named(architecture, tensors))
    if family is None:
        raise FileError(
            f"{files.name} has no configuration that says what model it is; expected a config.json with model_type "
            "(transformers) or architecture (timm), an open_clip_config.json, or the weights of OpenAI or Salesforce; "
            f"its tensors are {', '.join(list(tensors)[:5])}, ...")
    try:
        checkpoint = family.read(files, tensors)
    except (FileError, ConfigError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # JSON may hold anything
        raise FileError(f"{files.name} has a configuration that cannot be read: {type(error).__name__}: {error}"
                        ) from None
    vocabulary = checkpoint.vocabulary
    given = None if tokenizer is None else local_copy(user_path(tokenizer, "tokenizer"))
    return Opened(
        name=files.name, family=family.name, task=checkpoint.task, image=checkpoint.image, labels=checkpoint.labels,
        notes=(*notes, *checkpoint.notes), tensors=tensors, resize=family.resize,
        tokenizer=checkpoint.tokenizer if vocabulary is None else read_tokenizer(files, vocabulary, given),
        read=partial(read_params, tensors, checkpoint.rows, name=files.name, ignore=checkpoint.ignore))


def save_checkpoint(
    folder: str | Path, *, format: str, task: Task, params: Any, image: ImageConfig,
    labels: tuple[str, ...] | None = None, tokenizer: Tokenizer | None = None,
) -> None:
    """Write a new `folder` with configuration, preprocessing, vocabulary and weights in `format`.

    The folder appears complete or not at all; in a bucket it replaces an export whose upload was interrupted. Raises
    `FileError` if it exists, or if the format cannot hold the model.
    """
    folder = user_path(folder, "folder")
    if is_taken(folder):
        raise FileError(f"{folder} exists; expected a new folder")
    kind = type(getattr(task, "model", task))  # a task of another module may have no model
    families = {family.name: family for family in FAMILIES
                if family.write is not None and issubclass(kind, family.architecture)}
    if format not in families:
        raise FileError(f"format is {format!r}, which has no {kind.__name__}; expected "
                        f"{', '.join(name for name in get_args(Format) if name in families)}")
    family = families[format]
    export = family.write(task, image, labels, tokenizer)
    tensors = write_tensors(params, export.rows) | {
        name: Tensor(shape, np.dtype(np.float32), partial(np.zeros, shape, np.float32))
        for name, shape in export.zeros.items()}
    with new_folder(folder, last=export.weights) as part:
        for name, config in export.configs.items():
            (part / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            family.save_tokenizer(tokenizer, part)
        write_safetensors(part / export.weights, tensors, {"format": "pt"})
