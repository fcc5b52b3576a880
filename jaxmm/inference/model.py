"""A model with its preprocessing and tokenizer: `jaxmm.load`, and what can be done with the model that it returns."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32, UInt8

from jaxmm.config import ImageConfig
from jaxmm.data.images import BadImage, decode
from jaxmm.data.sources.nlvr import clean_sentence
from jaxmm.data.sources.vqa import clean_question
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.data.transforms import eval_image
from jaxmm.inference.answering import ANSWERS, SHORTLIST, candidate_tokens, choose_texts
from jaxmm.inference.batching import decode_ahead, outputs, pad_to_power_of_two, predict
from jaxmm.inference.captioning import CAPTIONS, make_attention_map_fn, word_attention_maps, write_texts
from jaxmm.inference.class_prompts import TEMPLATES, class_means, class_prompts, likeliest_labels
from jaxmm.inference.generate import Decoding
from jaxmm.inference.image_generation import Keep, complete_images, generate_images, image_decoding
from jaxmm.inference.inputs import (
    ImageLike,
    Images,
    as_images,
    as_labels,
    as_templates,
    as_texts,
    check_top,
    image_content,
)
from jaxmm.inference.matching import match_probabilities
from jaxmm.pretrained.io.files import FileError, Weights
from jaxmm.pretrained.registry import Format, open_checkpoint, save_checkpoint
from jaxmm.sharding import with_shardings
from jaxmm.task import Task, capabilities

log = logging.getLogger(__name__)

Batches = Iterator[dict[str, np.ndarray]]
OnError = Callable[[ImageLike, Exception], None]
ROUNDED = 16
"""Tokens: texts are cut or padded to multiples of it, so that there are few lengths."""
BATCH = 64
"""Most images or texts that the device computes at once. Fewer are padded to a power of two, so that batches of any
length need only a few compiled programs."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters, the task whose records hold the pure functions that use them, the preprocessing and the tokenizer.

    The methods take one image or text, or several, and return one row for each. An image that cannot be read raises
    `BadImage` or `OSError`; methods with `on_error` hand it to that function instead, and leave it out.
    """

    task: Task
    params: Any = field(repr=False)
    preprocessing: ImageConfig
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    labels: tuple[str, ...] | None = None
    """Names of the classes of a classification head."""
    notes: tuple[str, ...] = ()
    """Remarks on the checkpoint that the model was loaded from."""
    mesh: Mesh | None = None

    @property
    def config(self) -> Any:
        """The architecture, such as a `ViTConfig`, a `CLIPConfig` or a `BLIPConfig`."""
        return self.task.model

    @property
    def module(self) -> Any:
        """The Flax module, for `module.apply({"params": params}, task.pixels(images), ..., train=False)`."""
        return self.task.module

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def prepare(self, image: ImageLike | bytes) -> UInt8[np.ndarray, "size size 3"]:
        """Decode and resize one image, or the bytes of a file, as the model expects it."""
        size = self.task.image_size
        image = eval_image(decode(image_content(image)), self.preprocessing)
        return image[:size, :size]  # part of a patch at the border is not read

    def preprocess(self, images: Images) -> UInt8[np.ndarray, "b size size 3"]:
        """Decode and resize images as the model expects them; `task.pixels` then normalises them."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(self.prepare, as_images(images))))

    def tokenize(self, texts: str | Iterable[str]) -> Int32[np.ndarray, "b t"]:
        """Return texts as token ids, cut and padded as the model expects them."""
        if self.tokenizer is None:
            raise FileError("this model has no vocabulary; put bpe_simple_vocab_16e6.txt.gz, tokenizer.json, or "
                            "vocab.json with merges.txt beside its weights, or name one: load(..., tokenizer=FILE)")
        return self.tokenizer(as_texts(texts))

    def encode_image(self, images: Images, *, on_error: OnError | None = None) -> Float[np.ndarray, "b e"]:
        """Return image embeddings of length 1; of a model that embeds no texts, its features as they are."""
        self._require(self.task.embedder, "embeds images")
        return self._predict("image", self._batches(images, on_error))

    def encode_text(self, texts: str | Iterable[str]) -> Float[np.ndarray, "b e"]:
        """Return text embeddings of length 1.

        Texts of similar length are batched together, and cut if nothing behind their end token matters (CLIP).
        """
        embedder = self.task.embedder
        self._require(embedder and embedder.text, "embeds texts: CLIP, SigLIP, or BLIP that matches")
        tokens = self.tokenize(texts)
        needed = self._needed(tokens)
        order = np.argsort(needed, kind="stable")
        chunks = (order[i:i + BATCH] for i in range(0, len(order), BATCH))
        embeddings = self._predict("text", ({"tokens": tokens[chunk, :needed[chunk].max()]} for chunk in chunks))
        return embeddings[np.argsort(order)]

    def _needed(self, tokens: Int32[np.ndarray, "b t"]) -> np.ndarray:
        """Return how many tokens of each text its embedding depends on, rounded up."""
        length, text_length = tokens.shape[1], self.task.embedder.text_length
        if text_length is None:
            return np.full(len(tokens), length)
        return np.minimum(length, -(-text_length(tokens) // ROUNDED) * ROUNDED)

    def similarity(self, images: Images, texts: str | Iterable[str]) -> Float[np.ndarray, "b c"]:
        """Return the logits of every image with every text: scale x cosine + bias (of BLIP, the cosines)."""
        image, text, embedder = self.encode_image(images), self.encode_text(texts), self.task.embedder
        return np.asarray(embedder.scale(self.params)) * image @ text.T + np.asarray(embedder.bias(self.params))

    def classify(
        self, images: Images, labels: Iterable[str] | None = None, *, templates: str | Iterable[str] = TEMPLATES,
        top: int = 5, on_error: OnError | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Return the `top` likeliest (label, probability) of each image, best first.

        A model with a head chooses among its own classes. Others that embed texts choose among `labels`, each put into
        every one of `templates` (CLIP, section 3.1; see `class_prompts`); the probabilities are a softmax over them.
        """
        check_top(top)
        embedder, classifier = self.task.embedder, self.task.classifier
        if classifier is None and embedder is not None and embedder.text is not None:
            labels, templates = as_labels(labels), as_templates(templates)
            text = class_means(self.encode_text(class_prompts(labels, templates)), len(labels))
            logits = np.asarray(embedder.scale(self.params)) * self.encode_image(images, on_error=on_error) @ text.T
        else:
            self._require(classifier and not classifier.reads_text, "classifies images, or embeds images and texts")
            if labels is not None:
                raise ValueError(f"labels is given, but this model has a head for {self.task.classes} of its own")
            logits = self._predict("logits", self._batches(images, on_error))
            labels = self.labels or [str(i) for i in range(logits.shape[1])]
        return likeliest_labels(logits, labels, top)

    def caption(
        self, images: Images, *, prompt: str | None = None, decoding: Decoding = CAPTIONS, top: int = 1, seed: int = 0,
        choices: Iterable[str] | None = None, on_error: OnError | None = None,
    ) -> list[list[tuple[str, float]]]:
        """Return the `top` best (caption, score) of each image, best first.

        Captions continue `prompt` (None: that of training), which is not part of the result. The score is the mean
        log-probability per token if `decoding.length_penalty` is 1. Samples depend on `seed` and on the image's number
        only. With `choices`, captions are chosen among them, and the score is the log-probability of the text.
        """
        self._require(self.task.writes_captions, "writes captions, such as Salesforce/blip-image-captioning-base")
        prompt = self.task.decoder.prompt if prompt is None else prompt
        return self._decode(self._batches(images, on_error), prompt, decoding, top, seed, choices, None)

    def attention_maps(self, images: Images, captions: str | Iterable[str], *, prompt: str | None = None
                       ) -> list[list[tuple[str, Float[np.ndarray, "g g"]]]]:
        """Return the words of each image's caption, each with its cross-attention to the g x g patches of the image.

        A map is the mean over layers and heads. `captions` are one per image, such as `caption` wrote behind `prompt`.
        """
        decoder = self.task.decoder
        self._require(self.task.writes_captions and decoder.attention, "writes captions and shows its cross-attention")
        images, captions = list(as_images(images)), as_texts(captions, "captions", blank=False)
        if len(captions) != len(images):
            raise ValueError(f"there are {len(captions)} captions for {len(images)} images; expected one for each")
        self.tokenize([])  # raises if there is no vocabulary
        tokens, given = candidate_tokens(self.tokenizer, captions, decoder,
                                         decoder.prompt if prompt is None else prompt)
        length = min(decoder.longest, -(-tokens.shape[1] // ROUNDED) * ROUNDED)
        tokens = np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=decoder.pad_id)
        batches = (pad_to_power_of_two(batch | {"tokens": tokens[BATCH * number:][:len(batch["image"])]}, self.mesh)
                   for number, batch in enumerate(self._batches(images)))
        attend = make_attention_map_fn(self.task, self.mesh)
        return [word_attention_maps(self.tokenizer, ids[given:], maps[given:])
                for result, batch in outputs(attend, self.params, batches, self.mesh)
                for ids, maps in zip(batch["tokens"], result["attention"], strict=True)]

    def answer(
        self, images: Images, questions: str | Iterable[str], *, choices: Iterable[str] | None = None,
        decoding: Decoding = ANSWERS, top: int = 1, shortlist: int = SHORTLIST,
    ) -> list[list[tuple[str, float]]]:
        """Return the `top` best (answer, score) to each image's question (one text: the same for all), best first.

        Scores are those of `caption`. With `choices`, the answers are chosen among them; only the `shortlist` whose
        first token is likeliest are scored in full (see `inference.answering.rank`).
        """
        self._require(self.task.answers_questions, "answers questions, such as Salesforce/blip-vqa-base")
        images = list(as_images(images))
        questions = [questions] * len(images) if isinstance(questions, str) else as_texts(questions, "questions")
        if len(questions) != len(images):
            raise ValueError(f"there are {len(questions)} questions for {len(images)} images; expected one for each")
        clean = [clean_question(question) for question in questions]
        if "" in clean:
            raise ValueError(f"question {questions[clean.index('')]!r} has no words")
        tokens = self.tokenize(clean)
        batches = (batch | {"tokens": tokens[BATCH * number:][:len(batch["image"])]}
                   for number, batch in enumerate(self._batches(images)))
        return self._decode(batches, "", decoding, top, 0, choices, shortlist)

    def _decode(self, batches: Batches, prompt: str, decoding: Decoding, top: int, seed: int,
                choices: Iterable[str] | None, shortlist: int | None) -> list[list[tuple[str, float]]]:
        self.tokenize([])  # raises if there is no vocabulary
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is of type {type(prompt).__name__}; expected a string")
        if choices is None:
            return write_texts(self.task, self.params, batches, self.tokenizer, prompt=prompt, decoding=decoding,
                               top=top, seed=seed, mesh=self.mesh)
        choices = choices if isinstance(choices, str) else as_texts(choices, "choices", blank=False)
        return choose_texts(self.task, self.params, batches, self.tokenizer, choices, prompt=prompt, top=top,
                            shortlist=shortlist or max(1, len(choices)), mesh=self.mesh)

    def match(self, images: Images, texts: str | Iterable[str], *, on_error: OnError | None = None
              ) -> Float[np.ndarray, "b c"]:
        """Return the probability that image and text belong together, of every image with every text."""
        self._require(self.task.matcher, "matches images and texts, such as Salesforce/blip-itm-base-coco")
        return match_probabilities(self.task, self.params, self._batches(images, on_error), self.tokenize(texts),
                                   self.mesh)

    def compare_pair(self, pairs: Iterable[Any], texts: Iterable[str]
                     ) -> Float[np.ndarray, "b"]:
        """Return the probability that each text is true of the pair of images in the same place, as in NLVR2.

        `pairs` holds tuples of two images.
        """
        self._require(self.task.classifier and self.task.classifier.reads_text,
                      "judges a text about two images, such as model_base_nlvr.pth")
        pairs, texts = list(pairs), as_texts(texts)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise TypeError("pairs holds what is not a pair; expected two images for each text: [(LEFT, RIGHT), ...]")
        if len(pairs) != len(texts):
            raise ValueError(f"there are {len(pairs)} pairs and {len(texts)} texts; expected a text for each")
        if not pairs:
            return np.zeros(0, np.float32)
        tokens, size = self.tokenize([clean_sentence(text) for text in texts]), BATCH // 2
        batches = ({"image": batch["image"].reshape(-1, 2, *batch["image"].shape[1:]),
                    "tokens": tokens[size * number:][:len(batch["image"]) // 2]}
                   for number, batch in enumerate(self._batches(list(chain(*pairs)))))
        return np.asarray(jax.nn.softmax(self._predict("logits", batches))[:, 1])

    def generate_images(self, count: int = 1, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                        seed: int = 0) -> UInt8[np.ndarray, "n size size 3"]:
        """Return `count` sampled images; image number i depends on `seed` and i only."""
        self._require(self.task.generates_images, "generates images, such as openai/imagegpt-small")
        decoding = image_decoding(self.task.decoder, temperature=temperature, top_k=top_k, top_p=top_p)
        return generate_images(self.task, self.params, count, decoding, seed=seed, mesh=self.mesh)

    def complete(self, images: Images, *, keep: Keep = "top", samples: int = 1, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> UInt8[np.ndarray, "b n size size 3"]:
        """Return `samples` sampled completions of each image.

        `keep` is the part that stays: `top` or `left` (half of the image), or the share of it that comes first. The
        model writes row by row: what it writes depends on the pixels above and to the left, not on those to come.
        """
        self._require(self.task.generates_images, "generates images, such as openai/imagegpt-small")
        decoding = image_decoding(self.task.decoder, temperature=temperature, top_k=top_k, top_p=top_p)
        return complete_images(self.task, self.params, self.preprocess(images), keep, samples, decoding, seed=seed,
                               mesh=self.mesh)

    def save(self, folder: str | Path, *, format: Format = "jaxmm") -> None:
        """Write a new `folder` with configuration, preprocessing, vocabulary and weights, in a library's `format`.

        `jaxmm` holds any model; `transformers`, `open_clip` and `timm` load theirs with nothing missing and nothing
        left over. Raise `FileError` if that library computes no such model, or if the folder exists.
        """
        save_checkpoint(folder, format=format, task=self.task, params=self.params, image=self.preprocessing,
                        labels=self.labels, tokenizer=self.tokenizer)

    def _require(self, offered: Any, wanted: str) -> None:
        """Raise `ValueError` unless the model has the capability `wanted`."""
        if not offered:
            can = ", ".join(capabilities(self.task)) or "can only be trained"
            raise ValueError(f"this model is a {type(self.task).__name__}, which {can}; expected one that {wanted}")

    def _batches(self, images: Images, on_error: OnError | None = None) -> Batches:
        """Yield batches, decoded while the device computes those before."""
        ready: list[np.ndarray] = []
        for image, future in decode_ahead(as_images(images), self.prepare, 2 * BATCH):
            try:
                ready.append(future.result())
            except (BadImage, OSError) as error:
                if on_error is None:
                    raise
                on_error(image, error)
            if len(ready) == BATCH:
                yield {"image": np.stack(ready)}
                ready.clear()
        if ready:
            yield {"image": np.stack(ready)}

    def _predict(self, name: str, batches: Batches) -> np.ndarray:
        side = self.task.image_size or self.preprocessing.size
        shapes = {"image": jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)}
        if self.tokenizer is not None:
            shapes["tokens"] = jax.ShapeDtypeStruct((1, self.tokenizer.context_length), np.int32)
        padded = (pad_to_power_of_two(batch, self.mesh) for batch in batches)
        return predict(self.task, name, self.params, padded, shapes, self.mesh)


def load(
    source: str | Path, *, mesh: Mesh | None = None, dtype: str | None = None, revision: str | None = None,
    tokenizer: str | Path | None = None, architecture: str | None = None, weights: Weights | None = None,
) -> Model:
    """Load a model from the hub (`openai/clip-vit-base-patch32`), a folder, a file, or a run's workdir.

    Parameters are sharded over `mesh` (default: one device). `dtype` ("float32", "bfloat16") is that of parameters and
    activations; None: that of the checkpoint. `revision` is the hub's, or the number of a step of a workdir.
    `tokenizer` is a file or folder with the vocabulary, if it is not beside the weights. `architecture` names the model
    of an open_clip checkpoint without a configuration, such as "ViT-H-14", or a JSON file with its configuration.
    `weights` chooses between raw weights ("params") and their moving average ("average") in files with both; None: the
    raw ones. Raise `FileError`, which lists everything that does not fit.
    """
    opened = open_checkpoint(source, revision=revision, tokenizer=tokenizer, architecture=architecture, weights=weights)
    for note in opened.notes:
        log.warning("%s: %s", opened.name, note)
    task = opened.task if dtype is None else opened.task.with_dtype(dtype)
    like = jax.eval_shape(task.init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), like)
    if mesh is not None:
        like = with_shardings(like, mesh)
    return Model(task=task, params=opened.read(like), preprocessing=opened.image, tokenizer=opened.tokenizer,
                 labels=opened.labels, notes=opened.notes, mesh=mesh)
