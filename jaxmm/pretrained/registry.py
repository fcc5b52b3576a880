"""Which family a source of weights is of, and what it says of itself."""

from functools import partial
from pathlib import Path
from typing import Any

from jaxmm.pretrained.checkpoint import Checkpoint, Opened
from jaxmm.pretrained.families import native, npz, open_clip, salesforce, timm, transformers
from jaxmm.pretrained.families import transformers_blip as blip
from jaxmm.pretrained.io.files import FileError, Tensors, open_tensors
from jaxmm.pretrained.io.hub import Files, find
from jaxmm.pretrained.table import read_params
from jaxmm.pretrained.tokenizer import read_tokenizer


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, tokenizer: str | Path | None = None
) -> Opened:
    """Understands `source`; see `jaxmm.load` for its kinds. Raises `FileError`."""
    path = Path(source)
    if native.is_run(path):
        return native.open_run(path, revision)
    files = find(source, revision=revision)
    if (files.folder / native.MODEL).is_file():
        return native.open_model(files)
    tensors = npz.unwrapped(open_tensors(files.weights))
    found = understand(files, tensors)
    given = None if tokenizer is None else Path(tokenizer)
    words = found.words and read_tokenizer(files, found.words, found.context_length, given)
    return Opened(name=files.name, family=found.family, task=found.task, image=found.image, labels=found.labels,
                  notes=found.notes, tokenizer=words, tensors=tensors,
                  read=partial(read_params, tensors, found.rows, name=files.name, ignore=found.ignore))


def understand(files: Files, tensors: Tensors) -> Checkpoint:
    """Which family a checkpoint is of, and what it says of itself. Raises `FileError` where that is unknown."""
    if (config := files.json("open_clip_config.json")) is not None:
        return open_clip.read(config, tensors)
    config = files.json("config.json") or {}
    if config.get("model_type") == "blip":
        return blip.read_transformers(config, tensors, _preprocessor(files))
    if "model_type" in config:
        return transformers.read(config, tensors, _preprocessor(files))
    if "architecture" in config:
        return timm.read(config, tensors)
    if "visual.conv1.weight" in tensors or "visual.layer1.0.conv1.weight" in tensors:
        return open_clip.read_openai(tensors)
    if "visual_encoder.patch_embed.proj.weight" in tensors:
        return salesforce.read(tensors)
    if files.weights.suffix == ".npz":
        return npz.read(tensors, files.name)
    raise FileError(f"{files.name} has no configuration that says what model it is: wanted a config.json with "
                    "model_type (transformers) or architecture (timm), an open_clip_config.json, or the weights of "
                    "OpenAI or Salesforce")


def _preprocessor(files: Files) -> dict[str, Any] | None:
    """How pictures are prepared: transformers 5 writes it into the whole processor's file, and reads that first."""
    whole = files.json("processor_config.json") or {}
    return whole.get("image_processor") or files.json("preprocessor_config.json")
