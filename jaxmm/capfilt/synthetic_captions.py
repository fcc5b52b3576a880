"""The first stage: synthetic captions beside those from the web (Li et al. 2022, section 3.3).

What is written for a picture depends on the seed and the picture's key, never on what else is in the shard, on the
number of hosts or on restarts.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxmm.capfilt.image_batches import Picture, filled, grouped, placed, read_pictures
from jaxmm.capfilt.tables import WRITTEN, Texts
from jaxmm.config import require
from jaxmm.data.base import Source
from jaxmm.inference.captioning import make_caption_fn, prompt_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import Model

NUCLEUS = Decoding(sample=True, top_p=0.9, min_length=5, max_length=20)
"""As the paper's captioner writes (section 4.2)."""
PICTURES = 16
"""Pictures that are captioned at a time."""
EXAMPLES = 5
"""Records that cannot be used and are named, a shard."""

Done = Callable[[int], Any]
"""Told how many pictures more are done."""


def check_captioner(model: Model, name: str, decoding: Decoding, captions: int, prompt: str | None) -> None:
    """Raises `ConfigError` for a model that does not write, or that cannot write so many captions."""
    decoder = model.task.decoder
    require(model.task.writes_captions, "captioner", name,
            "a model that writes captions, such as Salesforce/blip-image-captioning-base")
    require(captions >= 0, "captions", captions, "0 or more")
    require(decoding.sample or captions <= decoding.beams, "captions", captions,
            f"at most decoding.beams = {decoding.beams} without decoding.sample")
    given = given_tokens(model, prompt)
    require(given.shape[1] < decoding.max_length <= decoder.longest, "decoding.max_length",
            decoding.max_length, f"above the prompt's {given.shape[1]} tokens, at most the model's "
            f"{decoder.longest} positions")


def given_tokens(model: Model, prompt: str | None) -> np.ndarray:
    """[1 p], what every caption begins with; `prompt` None: as in training."""
    prompt = model.task.decoder.prompt if prompt is None else prompt
    model.tokenize([])  # says what is missing
    return prompt_tokens(model.tokenizer, prompt, model.task.decoder)


def caption_shard(
    source: Source, captioners: Sequence[Model], *, decoding: Decoding = NUCLEUS, captions: int = 1, seed: int = 0,
    prompt: str | None = None, origin: str = "web", mesh: Mesh | None = None, done: Done = lambda count: None,
) -> Texts:
    """The texts of every picture of `source` that can be decoded: its own, then `captions` by each captioner.

    Captions that are drawn are independent of each other; with beams they are the best. Without captioners, the
    pictures' own texts alone.
    """
    columns: dict[str, list] = {name: [] for name in WRITTEN}
    bad: Counter[str] = Counter()
    examples: list[tuple[str, str]] = []

    def refuse(key, reason):
        bad[reason] += 1
        examples.append((key, reason))
        done(1)

    def add(picture, text, origin, captioner, score):
        row = picture.record, picture.key, picture.image_id, text, origin, captioner, score
        for name, value in zip(WRITTEN, row, strict=True):
            columns[name].append(value)

    models = captioners if captions else ()
    prepare = [model.prepare for model in models]
    pictures = 0
    for group in grouped(read_pictures(source, prepare, refuse), PICTURES):
        written = [_write(model, i, group, decoding, captions, seed, prompt, mesh) for i, model in enumerate(models)]
        for row, picture in enumerate(group):
            for text in picture.texts:
                add(picture, text, origin, None, None)
            for number, found in enumerate(written):
                told = set()
                for text, score in found[row]:
                    if text and text not in told:
                        add(picture, text, "synthetic", number, score)
                        told.add(text)
        pictures += len(group)
        done(len(group))
    return Texts(columns, pictures, dict(sorted(bad.items())), examples[:EXAMPLES])


def _write(model: Model, number: int, group: Sequence[Picture], decoding: Decoding, captions: int, seed: int,
           prompt: str | None, mesh: Mesh | None) -> list[list[tuple[str, float]]]:
    """The captions of each picture with their scores."""
    each, best = (captions, 1) if decoding.sample else (1, captions)
    given = given_tokens(model, prompt)
    fn = make_caption_fn(model.task, decoding, seed, mesh)
    rows = [draw_number(group[min(i, len(group) - 1)].key, number, j)
            for i, j in itertools.product(range(PICTURES), range(each))]
    found = fn(model.params, placed({"image": filled(group, number, PICTURES), "row": np.asarray(rows, np.int32),
                                     "prompt": np.repeat(given, len(rows), axis=0)}, mesh))
    tokens = np.asarray(found["tokens"])[:, :best].reshape(PICTURES, captions, -1)[:len(group), :, given.shape[1]:]
    scores = np.asarray(found["score"])[:, :best].reshape(PICTURES, captions)
    return [[(model.tokenizer.decode(text), float(score)) for text, score in zip(texts, row, strict=True)]
            for texts, row in zip(tokens, scores, strict=False)]


def draw_number(key: str, captioner: int, caption: int) -> int:
    """31 bits that say what is drawn for a caption of a picture."""
    name = f"{key}\0{captioner}\0{caption}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") >> 1
