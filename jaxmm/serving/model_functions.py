"""Functions that a model offers to a server. Each computes the answers to several requests in one batch.

The batches are padded to powers of two and texts to multiples of a length, so that few programs are compiled.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxmm.inference.answering import ANSWERS
from jaxmm.inference.batching import outputs, pad_to_power_of_two
from jaxmm.inference.captioning import check_length
from jaxmm.inference.class_prompts import class_means, class_prompts
from jaxmm.inference.generate import Decoding
from jaxmm.inference.matching import make_image_encoder, match_pairs
from jaxmm.inference.model import BATCH, Model
from jaxmm.serving.batch_queue import Compute
from jaxmm.validation import require

Pixels = UInt8[np.ndarray, "size size 3"]
"""An image as `Model.prepare` returns it."""
LABELS = 4096
"""Labels whose embeddings are kept."""


@dataclass(frozen=True)
class ModelFunction:
    """A function of a model."""

    compute: Compute
    example: Any
    """A request to compile the programs with."""
    largest: int = 1
    """Size of the largest batch that one request can need."""


def model_functions(model: Model, *, prompt: str | None, decoding: Decoding, templates: Sequence[str]
                    ) -> dict[str, ModelFunction]:
    """Return the functions of the model's capabilities by name.

    | name | request | answer |
    | --- | --- | --- |
    | caption | image | (caption, score) of all beams, best first |
    | attention | (image, text) | (word, attention map [g, g]) of each word |
    | answer | (image, question) | (answer, score) of all beams, best first |
    | match | (image, texts) | the probability of each text |
    | classes | image | (class, probability) of all classes of the head, best first |
    | image, text | image, text | its embedding |
    | labels | labels | their embeddings [c e], in all `templates` |

    Images are as `model.prepare` returns them, and `prompt` is that of `Model.caption`. Raise `ConfigError` for
    captions longer than the model writes.
    """
    task = model.task
    blank = model.prepare(np.zeros((2, 2, 3), np.uint8))
    # the model for images that are prepared already: to resize them to their own size changes nothing
    model = replace(model, preprocessing=replace(model.preprocessing, size=len(blank), eval_crop="squash",
                                                 eval_resize=1.0))
    functions = {}
    if task.writes_captions:
        check_length(decoding, task.decoder)
        require(not decoding.sample, "decoding.sample", decoding.sample, "False: requests are computed together")
        functions["caption"] = ModelFunction(
            lambda images: model.caption(images, prompt=prompt, decoding=decoding, top=decoding.beams), blank)
        if task.decoder.attention is not None:
            functions["attention"] = ModelFunction(partial(_attention, model, prompt), (blank, "a"))
    if task.answers_questions:
        functions["answer"] = ModelFunction(partial(_answer, model), (blank, "what is this?"))
    if task.matcher is not None:
        functions["match"] = ModelFunction(partial(_match, model), (blank, ["a"]))
    if task.classifier is not None and not task.classifier.reads_text:
        functions["classes"] = ModelFunction(partial(model.classify, top=2**31), blank)
    if task.embedder is not None and task.embedder.text is not None:
        functions["image"] = ModelFunction(model.encode_image, blank)
        functions["text"] = ModelFunction(model.encode_text, "a", BATCH)  # a request's labels share its programs
        if task.classifier is None:
            functions["labels"] = ModelFunction(LabelEmbeddings(model, templates), ["a"])
    return functions


def warm_up(functions: Iterable[ModelFunction], batch: int) -> None:
    """Compile the programs for batches of 1, 2, 4 requests and so on, up to `batch`, with short texts."""
    for function in functions:
        most = max(batch, function.largest)
        for size in sorted({min(2**i, most) for i in range(most.bit_length() + 1)}):
            function.compute([function.example] * size)


class LabelEmbeddings:
    """Embeds class names (see `class_prompts`), and keeps the embeddings of the last `LABELS` ones."""

    def __init__(self, model: Model, templates: Sequence[str]):
        self._model, self._templates = model, templates
        self._rows: OrderedDict[str, Float[np.ndarray, " e"]] = OrderedDict()

    def __call__(self, requests: list[Sequence[str]]) -> list[Float[np.ndarray, "c e"]]:
        """Return the embeddings of the labels of each request."""
        new = [label for label in dict.fromkeys(label for labels in requests for label in labels)
               if label not in self._rows]
        if new:
            prompts = self._model.encode_text(class_prompts(new, self._templates))
            self._rows.update(zip(new, class_means(prompts, len(new)), strict=True))
        embeddings = []
        for labels in requests:
            for label in labels:
                self._rows.move_to_end(label)
            embeddings.append(np.stack([self._rows[label] for label in labels]))
        while len(self._rows) > LABELS:
            self._rows.popitem(last=False)
        return embeddings


def _answer(model: Model, requests: list[tuple[Pixels, str]]) -> list[list[tuple[str, float]]]:
    images, questions = zip(*requests, strict=True)
    return model.answer(images, questions, top=ANSWERS.beams)


def _match(model: Model, requests: list[tuple[Pixels, Sequence[str]]]) -> list[Float[np.ndarray, " c"]]:
    from scipy.special import expit

    images, texts = zip(*requests, strict=True)
    counts = [len(own) for own in texts]
    [(encoded, _)] = outputs(make_image_encoder(model.task, model.mesh), model.params,
                             [pad_to_power_of_two({"image": np.stack(images)}, model.mesh)], model.mesh)
    logits = match_pairs(
        model.task, model.params, encoded["image_tokens"], model.tokenize([text for own in texts for text in own]),
        np.repeat(np.arange(len(images)), counts), np.arange(sum(counts)), model.mesh)
    return np.split(expit(logits[:, 1] - logits[:, 0]), np.cumsum(counts)[:-1])


def _attention(model: Model, prompt: str | None, requests: list[tuple[Pixels, str]]
               ) -> list[list[tuple[str, Float[np.ndarray, "g g"]]]]:
    images, texts = zip(*requests, strict=True)
    return model.attention_maps(images, texts, prompt=prompt)
