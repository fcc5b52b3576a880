"""A model with its own preprocessing and words: `jaxmm.load`, and what is done with what it returns."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from jaxmm.config import ImageConfig
from jaxmm.data.images import decode
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.data.transforms import eval_image
from jaxmm.evals.common import outputs, predict_fn, whole_batch
from jaxmm.evals.zero_shot import TEMPLATES, unit
from jaxmm.models.clip import CLIPConfig
from jaxmm.pretrained import npz, open_clip, timm, transformers
from jaxmm.pretrained.checkpoint import Checkpoint
from jaxmm.pretrained.files import FileError, Tensors, open_tensors, write_safetensors
from jaxmm.pretrained.source import Files, find
from jaxmm.pretrained.tables import read_params, write_tensors
from jaxmm.sharding import shardings
from jaxmm.tasks.base import Task
from jaxmm.tasks.classify import Classify
from jaxmm.tasks.contrastive import Contrastive

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image | np.ndarray
"""A file, a PIL picture, or uint8 [h, w, 3]."""
BATCH = 64
"""Pictures or texts that the device sees at once, at most. Fewer are filled up to a power of two, so that batches of
any length meet a handful of compiled programs."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters, the pure functions that use them (`task.predict`), and how pictures and words become their input."""

    task: Task
    params: Any = field(repr=False)
    image: ImageConfig
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    labels: tuple[str, ...] | None = None
    """Names of the classes of a classification head."""
    notes: tuple[str, ...] = ()
    """What to know of the checkpoint it came from."""
    mesh: Mesh | None = None

    @property
    def config(self):
        """The architecture: a `ViTConfig` or a `CLIPConfig`."""
        return self.task.model

    def preprocess(self, pictures: Sequence[Picture]) -> UInt8[np.ndarray, "b size size 3"]:
        """Pictures as the model was trained to see them. Raises `BadImage` for one that cannot be decoded."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self._prepare, pictures)))

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Texts as token ids, cut and padded as the model was trained to read them."""
        if self.tokenizer is None:
            raise FileError("this model has no tokenizer; token ids can be given to task.predict['text']")
        return self.tokenizer(texts)

    def encode_image(self, pictures: Iterable[Picture]) -> Float[np.ndarray, "b e"]:
        """Pictures in the shared space at length 1; of a classifier, its pooled features as they are."""
        name = "image" if isinstance(self.config, CLIPConfig) else "features"
        return self._run(name, self._pictures(pictures))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "b e"]:
        """Texts in the shared space at length 1."""
        chunks = (texts[i:i + BATCH] for i in range(0, len(texts), BATCH))
        return self._run("text", ({"tokens": self.tokenize(chunk)} for chunk in chunks))

    def similarity(self, pictures: Iterable[Picture], texts: Sequence[str]) -> Float[np.ndarray, "b c"]:
        """The model's logits: scale x cosine, plus SigLIP's bias."""
        scale, bias = np.exp(np.asarray(self.params["logit_scale"])), np.asarray(self.params.get("logit_bias", 0.0))
        return scale * self.encode_image(pictures) @ self.encode_text(texts).T + bias

    def classify(
        self, pictures: Iterable[Picture], labels: Sequence[str] | None = None, *,
        templates: Sequence[str] = TEMPLATES, top: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """The `top` likeliest (label, probability) of each picture, best first.

        With a head, among its own classes. CLIP and SigLIP choose among `labels`, each put into every one of
        `templates` (CLIP, section 3.1); probabilities are a softmax over them.
        """
        if isinstance(self.config, CLIPConfig):
            if not labels:
                raise ValueError("labels is empty; wanted names of classes, such as ['a cat', 'a dog']")
            prompts = [template.replace("{}", label) for label in labels for template in templates]
            text = unit(self.encode_text(prompts).reshape(len(labels), len(templates), -1).mean(axis=1))
            logits = np.exp(np.asarray(self.params["logit_scale"])) * self.encode_image(pictures) @ text.T
        else:
            if labels is not None:
                raise ValueError(f"labels is given, but this model has a head for {self.config.classes} of its own")
            logits = self._run("logits", self._pictures(pictures))
            labels = self.labels or [str(i) for i in range(logits.shape[1])]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [[(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]] for row in shares]

    def save(self, folder: str | Path, *, format: str) -> None:
        """Writes a new `folder` with configuration, preprocessing and weights, as `format` has them.

        `transformers` and `open_clip` load theirs with nothing missing and nothing left over. Raises `FileError`
        where that library computes no such model, or where the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileError(f"{folder} exists; wanted a new folder")
        if format == "transformers":
            config, preprocessor, rows = transformers.write(self.config, self.image, self.task.pixels, self.labels)
            texts, weights = {"config.json": config, "preprocessor_config.json": preprocessor}, "model.safetensors"
        elif format == "open_clip" and isinstance(self.config, CLIPConfig):
            config, rows = open_clip.write(self.config, self.image, self.task.pixels)
            texts, weights = {"open_clip_config.json": config}, "open_clip_model.safetensors"
        else:
            raise FileError(f"format is {format!r}; wanted transformers, or open_clip for two towers")
        tensors = write_tensors(self.params, rows)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a save that was interrupted
        part.mkdir(parents=True)
        for name, value in texts.items():
            (part / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        write_safetensors(part / weights, tensors, {"format": "pt"})
        part.rename(folder)

    def _prepare(self, picture: Picture) -> UInt8[np.ndarray, "size size 3"]:
        if isinstance(picture, (str, Path)):
            picture = Path(picture).read_bytes()
        image = picture.convert("RGB") if isinstance(picture, Image.Image) else decode(picture)
        size = self.config.vision.image_size if isinstance(self.config, CLIPConfig) else self.config.image_size
        return eval_image(image, self.image)[:size, :size]  # what is left of a patch at the borders is not read

    def _pictures(self, pictures: Iterable[Picture]) -> Iterator[dict[str, np.ndarray]]:
        """Batches, decoded while the device computes the one before."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pending: list = []
            for picture in pictures:
                pending.append(pool.submit(self._prepare, picture))
                if len(pending) == 2 * BATCH:
                    yield {"image": np.stack([future.result() for future in pending[:BATCH]])}
                    del pending[:BATCH]
            for start in range(0, len(pending), BATCH):
                yield {"image": np.stack([future.result() for future in pending[start:start + BATCH]])}

    def _run(self, name: str, batches: Iterable[dict[str, np.ndarray]]) -> np.ndarray:
        fn = predict_fn(self.task, (name,), self.mesh)
        results = [result[name] for result, _ in outputs(fn, self.params, map(self._filled, batches), self.mesh)]
        if not results:
            raise ValueError("there is nothing to encode: wanted one picture or text at least")
        return np.concatenate(results)

    def _filled(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(batch.values())))
        size = whole_batch(1 << (count - 1).bit_length(), self.mesh)
        filled = {name: np.concatenate([rows, np.repeat(rows[-1:], size - count, axis=0)])
                  for name, rows in batch.items()}
        return filled | {"mask": np.arange(size) < count}


def load(
    source: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None, revision: str | None = None
) -> Model:
    """A published model, from a folder, a file, or the hub (`openai/clip-vit-base-patch32`), ready to use.

    Parameters are laid out over `mesh` (default: one device). `dtype` ("float32", "bfloat16") is that of parameters
    and activations; None: float32. Raises `FileError`, which lists all that does not fit.
    """
    files = find(source, revision=revision)
    tensors = npz.unwrapped(open_tensors(files.weights))
    found = understand(files, tensors)
    for note in found.notes:
        log.warning("%s: %s", files.name, note)
    task = _task(found, dtype)
    like = jax.eval_shape(task.init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), like)
    if mesh is not None:
        like = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                            like, shardings(like, mesh))
    params = read_params(tensors, found.rows, like, name=files.name, ignore=found.ignore)
    return Model(task=task, params=params, image=found.image, labels=found.labels, notes=found.notes, mesh=mesh)


def understand(files: Files, tensors: Tensors) -> Checkpoint:
    """Which family a checkpoint is of, and what it says of itself. Raises `FileError` where that is unknown."""
    if (config := files.json("open_clip_config.json")) is not None:
        return open_clip.read(config, tensors)
    config = files.json("config.json") or {}
    if "model_type" in config:
        return transformers.read(config, tensors, files.json("preprocessor_config.json"))
    if "architecture" in config:
        return timm.read(config, tensors)
    if "visual.conv1.weight" in tensors or "visual.layer1.0.conv1.weight" in tensors:
        return open_clip.read_openai(tensors)
    if files.weights.suffix == ".npz":
        return npz.read(tensors, files.name)
    raise FileError(f"{files.name} has no configuration that says what model it is: wanted a config.json with "
                    "model_type (transformers) or architecture (timm), an open_clip_config.json, or OpenAI's weights")


def _task(found: Checkpoint, dtype: str | None) -> Task:
    def typed(tower):
        return replace(tower, transformer=replace(tower.transformer, dtype=dtype or tower.transformer.dtype))

    config = found.config
    if isinstance(config, CLIPConfig):
        config = replace(config, vision=typed(config.vision), text=typed(config.text))
        kind = "softmax" if config.logit_bias is None else "sigmoid"
        return Contrastive(model=config, pixels=found.pixels, kind=kind)
    return Classify(model=typed(config), pixels=found.pixels)
