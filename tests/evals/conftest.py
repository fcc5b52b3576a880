"""A linear model, its data in memory, and meshes, small enough for numpy to compute every number again."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig, TokenizerConfig
from jaxmm.data import Source
from jaxmm.evals import EvalContext
from jaxmm.task import Classifier, Embedder, Task

SIDE, EMBED, LENGTH, VOCABULARY, CLASSES = 4, 5, 6, 50, 7


@dataclass(frozen=True)
class MemorySource(Source):
    """Records in memory; an image that is `bytes` is a broken one."""

    images: tuple
    captions: tuple = ()
    labels: tuple = ()
    image_ids: tuple = ()
    classes: tuple | None = None
    name: str = "memory"
    fingerprint: str = "0"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        record = {"key": str(i), "image": self.images[i]}
        for key, values in (("texts", self.captions), ("label", self.labels), ("image_id", self.image_ids)):
            if values:
                record[key] = values[i]
        return record


@dataclass(frozen=True)
class LinearTask(Task):
    """Embeds images and bags of tokens by one matrix each."""

    normalised: bool = True
    traced: ClassVar[list] = []

    def _unit(self, x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) if self.normalised else x

    def _pixels(self, batch):
        self.traced.append(batch["image"].shape)
        return batch["image"].reshape(len(batch["image"]), -1) / 255.0

    @property
    def embedder(self):
        return Embedder(features=lambda params, batch: self._pixels(batch) @ params["image"],
                        image=lambda params, batch: self._unit(self._pixels(batch) @ params["image"]),
                        text=lambda params, batch: self._unit(params["text"][batch["tokens"]].sum(axis=1)))

    @property
    def classifier(self):
        return Classifier(logits=lambda params, batch: self._pixels(batch) @ params["head"])


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, texts):
        rows = [[ord(c) % VOCABULARY for c in text[:LENGTH].lower().ljust(LENGTH)] for text in texts]
        return np.array(rows, np.int32)


def one_per_image(source):
    """Return the pictures once each, with the captions of all records that have them."""
    images, captions = [], []
    for image, texts in zip(source.images, source.captions, strict=True):
        twin = next((i for i, other in enumerate(images) if np.array_equal(other, image)), None)
        if twin is None:
            images.append(image)
            captions.append(tuple(texts))
        else:
            captions[twin] += tuple(texts)
    return MemorySource(images=tuple(images), captions=tuple(captions))


def numpy_outputs(params, source, texts=()):
    """Return what `LinearTask` computes: features of the readable images, logits, and texts' embeddings."""
    x = np.stack([image for image in source.images if not isinstance(image, bytes)])
    x = x.reshape(len(x), -1) / np.float32(255)
    t = params["text"][Letters()(list(texts))].sum(axis=1) if len(texts) else None
    return x @ params["image"], x @ params["head"], t


def foil_records(images, texts, count):
    """Return `count` records (two images and two texts) of each kind: both images and both texts are nearest to their
    own, only the images, only the texts, or neither; embeddings are of length 1."""
    rng, kinds, scores = np.random.default_rng(3), {}, images @ texts.T
    while len(kinds) < 4 or min(map(len, kinds.values())) < count:
        (left, right), (one, other) = (rng.choice(n, 2, replace=False).tolist() for n in scores.shape)
        by_text = scores[left, one] - scores[left, other], scores[right, other] - scores[right, one]
        by_image = scores[left, one] - scores[right, one], scores[right, other] - scores[left, other]
        if np.abs([*by_text, *by_image]).min() > 1e-4:
            kind = kinds.setdefault((min(by_text) > 0, min(by_image) > 0), [])
            kind += [(left, right, one, other)] * (len(kind) < count)
    return [record for kind in kinds.values() for record in kind]


@pytest.fixture
def params():
    rng = np.random.default_rng(1)
    return {"image": rng.normal(size=(SIDE * SIDE * 3, EMBED)).astype(np.float32),
            "text": rng.normal(size=(VOCABULARY, EMBED)).astype(np.float32),
            "head": rng.normal(size=(SIDE * SIDE * 3, CLASSES)).astype(np.float32)}


@pytest.fixture
def pictures():
    def make(n, seed=0):
        return tuple(np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3)).astype(np.uint8))
    return make


@pytest.fixture
def context(params):
    def make(source, mesh=None, **fields):
        data = DataConfig(image=ImageConfig(size=SIDE), tokenizer=TokenizerConfig(context_length=LENGTH))
        if mesh is not None:
            replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            fields = {"params": jax.device_put(params, replicated)} | fields
        return EvalContext(**({"task": LinearTask(), "params": params, "data": data, "val": source, "mesh": mesh,
                               "tokenizer": Letters()} | fields))
    return make


@pytest.fixture(params=[None, (8, 1, 1), (2, 2, 2)], ids=str)
def mesh(request):
    if request.param is None:
        return None
    return jax.make_mesh(request.param, ("data", "fsdp", "tensor"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 3)
