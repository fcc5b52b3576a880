"""The first stage: generate captions beside those from the web (Li et al. 2022, section 3.3).

The captions of an image depend on the seed and the image's key only, not on the rest of the shard, the number of hosts
or restarts.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from jax.sharding import Mesh

from jaxmm.capfilt.image_batches import BATCH, WebImage, grouped, padded, read_images
from jaxmm.capfilt.tables import CAPTIONED, Texts
from jaxmm.data.base import Source
from jaxmm.inference.captioning import make_caption_fn, prompt_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import Model
from jaxmm.task import capabilities
from jaxmm.validation import at_least, check_types, require

NUCLEUS = Decoding(sample=True, top_p=0.9, min_length=5, max_length=20)
"""Decoding of the paper's captioner (section 4.2)."""
EXAMPLES = 5
"""Most records per shard that are named as unusable."""

Done = Callable[[int], Any]
"""Callback that receives the number of images finished since the last call."""


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Options of the synthetic captions."""

    captions: Annotated[int, at_least(0)] = 1
    """Synthetic captions per image and captioner."""
    decoding: Decoding = field(default_factory=lambda: NUCLEUS)
    """Search or sampling of the tokens; default: nucleus sampling with p = 0.9."""
    prompt: str | None = None
    """Beginning of every caption; default: that of the captioner's training."""
    seed: int = 0
    """Seed of the sampling. An image's captions depend on it and on the image's key only."""

    def __post_init__(self):
        """Check that there are beams for all captions."""
        check_types(self)
        require(self.decoding.sample or self.captions <= self.decoding.beams, "captions", self.captions,
                f"at most decoding.beams = {self.decoding.beams} without decoding.sample")


DEFAULTS = CaptionOptions()


def check_captioner(model: Model, name: str, options: CaptionOptions) -> None:
    """Raise `ConfigError` for a model that does not write captions, or none as long as `options` asks for."""
    offered = capabilities(model.task)
    require("writes captions" in offered, "captioner", name,
            "a model that writes captions, such as Salesforce/blip-image-captioning-base; this one "
            f"{', '.join(offered) or 'offers nothing'}")
    decoding, longest, given = options.decoding, model.task.decoder.longest, prompt_of(model, options).shape[1]
    require(given < decoding.max_length <= longest, "decoding.max_length", decoding.max_length,
            f"above the prompt's {given} tokens, at most the model's {longest} positions")


def prompt_of(model: Model, options: CaptionOptions) -> np.ndarray:
    """Return the tokens that every caption begins with, [1 p]."""
    prompt = model.task.decoder.prompt if options.prompt is None else options.prompt
    model.tokenize([])  # raises if the vocabulary is missing
    return prompt_tokens(model.tokenizer, prompt, model.task.decoder)


def caption_shard(source: Source, captioners: Sequence[Model], options: CaptionOptions = DEFAULTS, *,
                  origin: str = "web", mesh: Mesh | None = None, done: Done = lambda count: None) -> Texts:
    """Return the texts of every image of `source` that can be decoded: its own, then those of each captioner.

    Sampled captions are independent of each other; with beams they are the best ones. Without captioners, only the
    images' own texts are returned.
    """
    columns: dict[str, list] = {name: [] for name in CAPTIONED}
    bad: Counter[str] = Counter()
    examples: list[tuple[str, str]] = []

    def skip(key, reason):
        bad[reason] += 1
        examples.append((key, reason))
        done(1)

    def add(image, text, origin, captioner, score):
        row = image.record, image.key, image.image_id, text, origin, captioner, score
        for name, value in zip(CAPTIONED, row, strict=True):
            columns[name].append(value)

    models = captioners if options.captions else ()
    images = 0
    for group in grouped(read_images(source, [model.prepare for model in models], skip)):
        generated = [_generate(model, number, group, options, mesh) for number, model in enumerate(models)]
        for row, image in enumerate(group):
            for text in image.texts:
                add(image, text, origin, None, None)
            for number, captions in enumerate(generated):
                for text, score in _distinct(captions[row]):
                    add(image, text, "synthetic", number, score)
        images += len(group)
        done(len(group))
    return Texts(columns, images, dict(sorted(bad.items())), examples[:EXAMPLES])


def _generate(model: Model, number: int, group: Sequence[WebImage], options: CaptionOptions, mesh: Mesh | None
              ) -> list[list[tuple[str, float]]]:
    """Return the captions of each image with their scores."""
    draws, best = (options.captions, 1) if options.decoding.sample else (1, options.captions)
    prompt = prompt_of(model, options)
    generate = make_caption_fn(model.task, options.decoding, options.seed, mesh)
    keys = [image.key for image in group] + [group[-1].key] * (BATCH - len(group))
    rows = [draw_number(key, number, draw) for key, draw in itertools.product(keys, range(draws))]
    inputs = (padded({"image": np.stack([image.views[number] for image in group])}, BATCH, mesh)
              | padded({"row": np.asarray(rows, np.int32), "prompt": np.repeat(prompt, len(rows), axis=0)}, len(rows),
                       mesh))
    result = generate(model.params, inputs)
    shape = BATCH, options.captions
    tokens = np.asarray(result["tokens"])[:, :best].reshape(*shape, -1)[:len(group), :, prompt.shape[1]:]
    scores = np.asarray(result["score"])[:, :best].reshape(shape)
    return [[(model.tokenizer.decode(text), float(score)) for text, score in zip(texts, row, strict=True)]
            for texts, row in zip(tokens, scores, strict=False)]


def _distinct(captions: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the captions that are not empty, the first of those with the same text."""
    scores = {}
    for text, score in captions:
        if text:
            scores.setdefault(text, score)
    return list(scores.items())


def draw_number(key: str, captioner: int, caption: int) -> int:
    """Return the 31-bit number that decides what is sampled for a caption of an image."""
    name = f"{key}\0{captioner}\0{caption}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") >> 1
