"""A model with its own preprocessing and words: `jaxmm.load`, and what is done with what it returns."""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32, UInt8
from PIL import Image

from jaxmm.config import ImageConfig
from jaxmm.data.images import BadImage, decode
from jaxmm.data.sources.nlvr import cleaned
from jaxmm.data.sources.vqa import clean_question
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.data.transforms import eval_image
from jaxmm.inference.answering import ANSWERS, SHORTLIST, candidate_tokens, make_rank_fn
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn, predictions
from jaxmm.inference.captioning import CAPTIONS, make_caption_fn, prompt_tokens
from jaxmm.inference.class_prompts import TEMPLATES, class_means, class_prompts
from jaxmm.inference.generate import Decoding
from jaxmm.inference.matching import make_image_encoder, match_pairs, power_of_two
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import Format, open_checkpoint, save_checkpoint
from jaxmm.sharding import with_shardings
from jaxmm.task import Task, capabilities

log = logging.getLogger(__name__)

Picture = str | Path | Image.Image | np.ndarray
"""A file, a PIL picture, or uint8 [h, w, 3]."""
OnError = Callable[[Picture, Exception], None]
ROUNDED = 16
"""Tokens: texts are cut to multiples of it."""
BATCH = 64
"""Pictures or texts that the device sees at once, at most. Fewer are filled up to a power of two, so that batches of
any length meet a handful of compiled programs."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters, the task whose records hold the pure functions that use them, the preprocessing and the tokenizer."""

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
        """The architecture: a `ViTConfig`, a `CLIPConfig` or a `BLIPConfig`."""
        return self.task.model

    @property
    def module(self):
        """The Flax module, a pure function: `module.apply({"params": params}, image, ..., train=False)`."""
        return self.task.module

    @property
    def parameters(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def prepare(self, picture: Picture) -> UInt8[np.ndarray, "size size 3"]:
        """One picture as the model was trained to see it. Raises `BadImage` or `OSError` for one that cannot be read.
        """
        if isinstance(picture, (str, Path)):
            picture = Path(picture).read_bytes()
        image = picture.convert("RGB") if isinstance(picture, Image.Image) else decode(picture)
        size = self.task.image_size
        return eval_image(image, self.image)[:size, :size]  # what is left of a patch at the borders is not read

    def preprocess(self, pictures: Sequence[Picture]) -> UInt8[np.ndarray, "b size size 3"]:
        """Pictures as the model was trained to see them. Raises `BadImage` for one that cannot be decoded."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self.prepare, pictures)))

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Texts as token ids, cut and padded as the model was trained to read them."""
        if self.tokenizer is None:
            raise FileError("this model has no vocabulary; put bpe_simple_vocab_16e6.txt.gz, tokenizer.json, or "
                            "vocab.json with merges.txt beside its weights, or name one: load(..., tokenizer=FILE)")
        return self.tokenizer(texts)

    def encode_image(self, pictures: Iterable[Picture], *, on_error: OnError | None = None
                     ) -> Float[np.ndarray, "b e"]:
        """Pictures in the shared space at length 1; of a classifier, its pooled features as they are.

        A picture that cannot be read raises `BadImage` or OSError; with `on_error` it is handed there and left out.
        """
        if self.task.embedder is None:
            raise ValueError(f"{self._cannot()}; wanted one that embeds images")
        return self._run("image", self._pictures(pictures, on_error))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "b e"]:
        """Texts in the shared space at length 1.

        Where nothing behind the end token is seen (CLIP), texts of like length go together and are cut behind it.
        """
        if self.task.embedder is None or self.task.embedder.text is None:
            raise ValueError(f"{self._cannot()}; wanted one that embeds texts: CLIP, SigLIP, or BLIP that matches")
        tokens = self.tokenize(texts)
        needed = self._needed(tokens)
        order = np.argsort(needed, kind="stable")
        chunks = (order[i:i + BATCH] for i in range(0, len(order), BATCH))
        found = self._run("text", ({"tokens": tokens[chunk, :needed[chunk].max()]} for chunk in chunks))
        return found[np.argsort(order)]

    def _needed(self, tokens: Int32[np.ndarray, "b t"]) -> np.ndarray:
        """How many tokens of each text its embedding depends on, rounded up so that there are few lengths."""
        length = tokens.shape[1]
        if self.task.embedder.text_length is None:
            return np.full(len(tokens), length)
        return np.minimum(length, -(-self.task.embedder.text_length(tokens) // ROUNDED) * ROUNDED)

    def similarity(self, pictures: Iterable[Picture], texts: Sequence[str]) -> Float[np.ndarray, "b c"]:
        """The model's logits: scale x cosine, plus SigLIP's bias; of BLIP, the cosines."""
        images, texts = self.encode_image(pictures), self.encode_text(texts)
        scale, bias = (np.asarray(part(self.params)) for part in (self.task.embedder.scale, self.task.embedder.bias))
        return scale * images @ texts.T + bias

    def classify(
        self, pictures: Iterable[Picture], labels: Sequence[str] | None = None, *,
        templates: Sequence[str] = TEMPLATES, top: int = 5, on_error: OnError | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The `top` likeliest (label, probability) of each picture, best first.

        With a head, among its own classes. CLIP and SigLIP choose among `labels`, each put into every one of
        `templates` (CLIP, section 3.1); probabilities are a softmax over them. `on_error` as in `encode_image`.
        """
        embedder, classifier = self.task.embedder, self.task.classifier
        if classifier is None and embedder is not None and embedder.text is not None:
            if not labels:
                raise ValueError("labels is empty; wanted names of classes, such as ['a cat', 'a dog']")
            text = class_means(self.encode_text(class_prompts(labels, templates)), len(labels))
            logits = np.asarray(embedder.scale(self.params)) * self.encode_image(pictures, on_error=on_error) @ text.T
        else:
            if labels is not None:
                raise ValueError(f"labels is given, but this model has a head for {self.task.classes} of its own")
            if classifier is None or classifier.reads_text:
                raise ValueError(f"{self._cannot()}; wanted one that classifies images, or two towers and labels")
            logits = self._run("logits", self._pictures(pictures, on_error))
            labels = self.labels or [str(i) for i in range(logits.shape[1])]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [[(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]] for row in shares]

    def caption(
        self, pictures: Iterable[Picture], *, prompt: str | None = None, decoding: Decoding = CAPTIONS, top: int = 1,
        seed: int = 0, choices: Sequence[str] | None = None, on_error: OnError | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The `top` best (caption, score) of each picture, best first.

        Written behind `prompt` (None: the one that the model was trained with), which is not part of the result. The
        score is the mean log-probability of a token, where `decoding.length_penalty` is 1. What is drawn depends on
        `seed` and on a picture's number. Among `choices`, the score is the log-probability of the whole text.
        """
        if not self.task.writes_captions:
            raise ValueError(f"{self._cannot()}; wanted one that writes captions, such as "
                             "Salesforce/blip-image-captioning-base")
        prompt = self.task.decoder.prompt if prompt is None else prompt
        batches = self._pictures(pictures, on_error)
        if choices is not None:
            return self._chosen(batches, choices, prompt, top, max(1, len(choices)))
        return self._written(batches, prompt, decoding, top, seed)

    def answer(
        self, pictures: Iterable[Picture], questions: Sequence[str] | str, *, choices: Sequence[str] | None = None,
        decoding: Decoding = ANSWERS, top: int = 1, shortlist: int = SHORTLIST,
    ) -> list[list[tuple[str, float]]]:
        """The `top` best (answer, score) to each picture's question (one text: the same for all), best first.

        Written freely, with scores as of captions; or chosen among `choices`, by the log-probability of the whole
        answer, of which those `shortlist` are compared whose first token is likeliest (`inference.answering.rank`).
        """
        if not self.task.answers_questions:
            raise ValueError(f"{self._cannot()}; wanted one that answers questions, such as Salesforce/blip-vqa-base")
        pictures = list(pictures)
        asked = [questions] * len(pictures) if isinstance(questions, str) else questions
        if len(asked) != len(pictures):
            raise ValueError(f"there are {len(asked)} questions for {len(pictures)} pictures; wanted one for each")
        cleaned = [clean_question(question) for question in asked]
        if "" in cleaned:
            raise ValueError(f"question {asked[cleaned.index('')]!r} has no words")
        starts, tokens = itertools.count(0, BATCH), self.tokenize(cleaned)
        batches = (batch | {"tokens": tokens[start:start + len(batch["image"])]}
                   for start, batch in zip(starts, self._pictures(pictures), strict=False))
        if choices is not None:
            return self._chosen(batches, choices, "", top, shortlist)
        return self._written(batches, "", decoding, top, 0)

    def _written(self, batches: Iterable[dict[str, np.ndarray]], prompt: str, decoding: Decoding, top: int, seed: int
                 ) -> list[list[tuple[str, float]]]:
        if not 0 < top <= decoding.beams:
            raise ValueError(f"top is {top}; wanted 1 to decoding.beams = {decoding.beams}")
        given = prompt_tokens(self._words, prompt, self.task.decoder)
        if given.shape[1] >= decoding.max_length:
            raise ValueError(f"the prompt has {given.shape[1]} tokens; decoding.max_length = {decoding.max_length} "
                             "leaves no room behind it")
        fn, rows, texts = make_caption_fn(self.task, decoding, seed, self.mesh), itertools.count(), []
        batches = ({"prompt": np.repeat(given, len(batch["image"]), axis=0),
                    "row": np.asarray(list(itertools.islice(rows, len(batch["image"]))), np.int32)} | batch
                   for batch in batches)
        for result, _ in outputs(fn, self.params, map(self._filled, batches), self.mesh):
            texts += [[(self._words.decode(row[given.shape[1]:]), float(score))
                       for row, score in zip(tokens[:top], scores, strict=False)]
                      for tokens, scores in zip(result["tokens"], result["score"], strict=True)]
        return texts

    def _chosen(self, batches: Iterable[dict[str, np.ndarray]], choices: Sequence[str], prompt: str, top: int,
                shortlist: int) -> list[list[tuple[str, float]]]:
        if top < 1 or shortlist < 1:
            raise ValueError(f"top is {top} and shortlist {shortlist}; wanted positive numbers")
        candidates, given = candidate_tokens(self._words, choices, self.task.decoder, prompt)
        fn = partial(make_rank_fn(self.task, given, top, shortlist, 0.0, self.mesh), candidates=candidates)
        return [[(choices[i], float(score)) for i, score in zip(*each, strict=True)]
                for result, _ in outputs(fn, self.params, map(self._filled, batches), self.mesh)
                for each in zip(result["index"], result["score"], strict=True)]

    def match(self, pictures: Iterable[Picture], texts: Sequence[str], *, on_error: OnError | None = None
              ) -> Float[np.ndarray, "b c"]:
        """The probability that each picture and each text belong together. A picture is encoded once for all texts."""
        if self.task.matcher is None:
            raise ValueError(f"{self._cannot()}; wanted one that matches images and texts, such as "
                             "Salesforce/blip-itm-base-coco")
        from scipy.special import expit

        tokens, found = self.tokenize(texts), []
        batches = map(self._filled, self._pictures(pictures, on_error))
        for result, _ in outputs(make_image_encoder(self.task, self.mesh), self.params, batches, self.mesh):
            shape = len(result["image_tokens"]), len(texts)
            logits = match_pairs(self.task, self.params, result["image_tokens"], tokens,
                                 *(place.ravel() for place in np.indices(shape)), self.mesh)
            found.append(expit(logits[:, 1] - logits[:, 0]).reshape(shape))
        return np.concatenate(found) if found else np.zeros((0, len(texts)), np.float32)

    def compare(self, pairs: Sequence[tuple[Picture, Picture]], texts: Sequence[str]) -> Float[np.ndarray, "b"]:
        """The probability that each text is true of the two pictures in its place. They are read as in NLVR2."""
        if self.task.classifier is None or not self.task.classifier.reads_text:
            raise ValueError(f"{self._cannot()}; wanted one that judges a text about two images, such as "
                             "model_base_nlvr.pth")
        if len(pairs) != len(texts):
            raise ValueError(f"there are {len(pairs)} pairs and {len(texts)} texts; wanted a text for each")
        if not pairs:
            return np.zeros(0, np.float32)
        tokens = self.tokenize([cleaned(text) for text in texts])
        parts = [slice(start, start + BATCH // 2) for start in range(0, len(pairs), BATCH // 2)]
        images = (self.preprocess([*itertools.chain(*pairs[part])]) for part in parts)
        logits = self._run("logits", ({"image": image.reshape(-1, 2, *image.shape[1:]), "tokens": tokens[part]}
                                      for image, part in zip(images, parts, strict=True)))
        return np.asarray(jax.nn.softmax(logits)[:, 1])

    def _cannot(self) -> str:
        """Return the start of a message: what this model does, where it was asked for something else."""
        return f"this model is a {type(self.task).__name__}, which {' and '.join(capabilities(self.task)) or 'trains'}"

    @property
    def _words(self) -> Tokenizer:
        self.tokenize([])  # says what is missing
        return self.tokenizer

    def save(self, folder: str | Path, *, format: Format = "jaxmm") -> None:
        """Writes a new `folder` with configuration, preprocessing, vocabulary and weights, as `format` has them.

        `jaxmm` holds any model; `transformers`, `open_clip` and `timm` load theirs with nothing missing and nothing
        left over. Raises `FileError` where that library computes no such model, or where the folder exists.
        """
        save_checkpoint(folder, format=format, task=self.task, params=self.params, image=self.image,
                        labels=self.labels, tokenizer=self.tokenizer)

    def _pictures(
        self, pictures: Iterable[Picture], on_error: OnError | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches, decoded while the device computes the one before."""
        ready: list[np.ndarray] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pending: deque = deque()

            def take():
                picture, future = pending.popleft()
                try:
                    ready.append(future.result())
                except (BadImage, OSError) as error:
                    if on_error is None:
                        raise
                    on_error(picture, error)

            for picture in pictures:
                pending.append((picture, pool.submit(self.prepare, picture)))
                while len(pending) >= 2 * BATCH or (len(pending) >= BATCH and pending[0][1].done()):
                    take()
                if len(ready) >= BATCH:
                    yield {"image": np.stack(ready[:BATCH])}
                    del ready[:BATCH]
            while pending:
                take()
        for start in range(0, len(ready), BATCH):
            yield {"image": np.stack(ready[start:start + BATCH])}

    def _run(self, name: str, batches: Iterable[dict[str, np.ndarray]]) -> np.ndarray:
        fn = predict_fn(self.task, (name,), self.mesh)
        results = [result[name] for result, _ in outputs(fn, self.params, map(self._filled, batches), self.mesh)]
        return np.concatenate(results) if results else np.zeros((0, *self._shape(name)), np.float32)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one row of the output `name`."""
        side = self.task.image_size or self.image.size
        batch = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
        if self.tokenizer is not None:
            batch["tokens"] = jax.ShapeDtypeStruct((1, self.tokenizer.context_length), np.int32)
        return jax.eval_shape(predictions(self.task)[name], self.params, batch).shape[1:]

    def _filled(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(batch.values())))
        size = padded_batch_size(power_of_two(count), self.mesh)
        filled = {name: np.concatenate([rows, np.repeat(rows[-1:], size - count, axis=0)])
                  for name, rows in batch.items()}
        return filled | {"mask": np.arange(size) < count}


def load(
    source: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None, revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """A model, ready to use, from the hub (`openai/clip-vit-base-patch32`), a folder, a file, or a run's work folder.

    Parameters are laid out over `mesh` (default: one device). `dtype` ("float32", "bfloat16") is that of parameters
    and activations; None: as the model was made. `revision` is the hub's, or of a work folder the number of a step.
    `tokenizer` is a file or folder with the vocabulary, where it does not lie beside the weights. Raises `FileError`,
    which lists all that does not fit.
    """
    opened = open_checkpoint(source, revision=revision, tokenizer=tokenizer)
    for note in opened.notes:
        log.warning("%s: %s", opened.name, note)
    task = opened.task if dtype is None else opened.task.with_dtype(dtype)
    like = jax.eval_shape(task.init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), like)
    if mesh is not None:
        like = with_shardings(like, mesh)
    return Model(task=task, params=opened.read(like), image=opened.image, tokenizer=opened.tokenizer,
                 labels=opened.labels, notes=opened.notes, mesh=mesh)
