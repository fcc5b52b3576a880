"""What the endpoints call: a model with its queue, threads that decode images, an index and limits."""

import asyncio
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from fastapi import HTTPException

from jaxmm.data.images import BadImage, decode, header_size
from jaxmm.data.sources.vqa import clean_question
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.class_prompts import TEMPLATES, likeliest_labels
from jaxmm.inference.generate import Decoding
from jaxmm.inference.inputs import as_templates, image_content
from jaxmm.inference.model import Model
from jaxmm.inference.search import Index
from jaxmm.pages import data_uri
from jaxmm.serving.batch_queue import BatchQueue
from jaxmm.serving.limits import Limits
from jaxmm.serving.model_functions import Pixels, model_functions, warm_up
from jaxmm.serving.server_metrics import ServerMetrics
from jaxmm.task import capabilities
from jaxmm.validation import ConfigError, require

Scored = list[tuple[str, float]]
"""(text, score), best first."""
THUMBNAIL = 320
"""Most pixels of the longer side of an image of the index, as it is shown."""


class ModelService:
    """Answers requests. A request that cannot be answered raises `HTTPException`, or `QueueFull` from its place."""

    def __init__(self, model: Model, name: str, *, index: Index | None = None, prompt: str | None = None,
                 decoding: Decoding = CAPTIONS, templates: Sequence[str] = TEMPLATES, limits: Limits | None = None):
        self.model, self.name, self.index, self.limits = model, name, index, limits or Limits()
        self.functions = model_functions(model, prompt=prompt, decoding=decoding,
                                         templates=as_templates(templates))
        if not self.functions:
            raise ConfigError(f"model is a {type(model.task).__name__}, which {', '.join(capabilities(model.task))}; "
                              "expected one that captions, answers, matches, classifies or searches")
        if index is not None:
            require("text" in self.functions, "index", type(model.task).__name__, "a model that embeds texts, too")
            size, expected = index.embeddings.shape[1], model.encode_image([]).shape[1]
            require(size == expected, "index", f"{size} numbers per image", f"{expected}, those of the model")
        self.metrics = ServerMetrics(lambda: self.queue.waiting)
        self.queue = BatchQueue({name: function.compute for name, function in self.functions.items()},
                                batch=self.limits.batch, waiting=self.limits.waiting, collect=self.limits.collect,
                                on_batch=self.metrics.count_batch)
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        self._thumbnail = lru_cache(maxsize=512)(self._read_thumbnail)

    @property
    def offers(self) -> tuple[str, ...]:
        """Names of the endpoints that the model has."""
        endpoints = {"caption": "caption", "attention": "attention", "answer": "answer", "match": "match",
                    "classes": "classify", "labels": "classify"}
        search = ("search",) if self.index is not None else ()
        return (*(endpoints[name] for name in self.functions if name in endpoints), *search)

    @property
    def own_classes(self) -> bool:
        """True if the model chooses among its own classes, False if among the labels of a request."""
        return "classes" in self.functions

    def warm_up(self) -> None:
        """Compile the programs before the first request."""
        warm_up(self.functions.values(), self.limits.batch)

    def close(self) -> None:
        """Answer what waits, then stop the threads."""
        self.queue.close()
        self._pool.shutdown()

    async def read_image(self, file: BinaryIO) -> Pixels:
        """Decode and resize an upload. Its header decides whether it is decoded."""
        return await self._in_pool(self._read_image, file)

    async def caption(self, pixels: Pixels, top: int) -> Scored:
        """Return the best captions; their number is limited by the beams."""
        return (await self._compute("caption", pixels))[:top]

    async def attention(self, pixels: Pixels, text: str | None) -> tuple[str, str, list[tuple[str, np.ndarray]]]:
        """Return the text (None: the caption), the image as the model reads it as a data URI, and each word's map."""
        if text is None:
            [(text, _)] = await self.caption(pixels, 1)
        else:
            text = self._check_text(text, "text")
        words = await self._compute("attention", (pixels, text)) if text.strip() else []
        return text, await self._in_pool(data_uri, pixels), words

    async def answer(self, pixels: Pixels, question: str, top: int) -> Scored:
        """Return the best answers to a question; their number is limited by the beams."""
        question = self._check_text(question, "question")
        if not clean_question(question):
            raise HTTPException(422, "question has no words")
        return (await self._compute("answer", (pixels, question)))[:top]

    async def match(self, pixels: Pixels, texts: Sequence[str]) -> Scored:
        """Return each text with the probability that it belongs to the image, in the order of the texts."""
        texts = self._check_texts(texts, "texts")
        return list(zip(texts, map(float, await self._compute("match", (pixels, texts))), strict=True))

    async def classify(self, pixels: Pixels, labels: Sequence[str], top: int) -> Scored:
        """Return the likeliest labels, or classes of the model's own, with their probabilities."""
        if self.own_classes:
            if labels:
                raise HTTPException(422, "labels is given, but this model has classes of its own; expected none")
            return (await self._compute("classes", pixels))[:top]
        labels = list(dict.fromkeys(self._check_texts(labels, "labels")))
        embeddings, image = await asyncio.gather(self._compute("labels", labels), self._compute("image", pixels))
        scale = np.asarray(self.model.task.embedder.scale(self.model.params))
        return likeliest_labels(scale * image[None] @ embeddings.T, labels, top)[0]

    async def search(self, query: Pixels | str, top: int) -> list[tuple[int, str, float]]:
        """Return number, file name and cosine of the images of the index nearest to an image or a text."""
        if isinstance(query, str):
            embedding = await self._compute("text", self._check_text(query, "text"))
        else:
            embedding = await self._compute("image", query)
        results = await self._in_pool(self.index.nearest, embedding, top)
        return [(number, Path(self.index.paths[number]).name, score) for number, score in results]

    async def thumbnail(self, number: int) -> bytes:
        """Return an image of the index as WebP."""
        return await self._in_pool(self._thumbnail, number)

    async def _compute(self, function: str, content: Any) -> Any:
        return await asyncio.wrap_future(self.queue.submit(function, content))

    async def _in_pool(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _read_image(self, file: BinaryIO) -> Pixels:
        data, most = file.read(), self.limits.pixels
        try:
            width, height = header_size(data)
            if width * height > most:
                raise BadImage("too large")
            return self.model.prepare(data)
        except BadImage as error:
            if error.reason == "too large":
                raise HTTPException(413, f"the image is too large; expected at most {most:,} pixels") from None
            raise HTTPException(422, f"the upload is {error}") from None

    def _read_thumbnail(self, number: int) -> bytes:
        try:
            image = decode(image_content(self.index.paths[number]))
        except (OSError, BadImage, IndexError):
            raise HTTPException(404, f"image {number} of the index is not there, or cannot be read") from None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "WEBP", quality=80)
        return out.getvalue()

    def _check_texts(self, texts: Sequence[str], name: str) -> list[str]:
        if not 0 < len(texts) <= self.limits.texts:
            raise HTTPException(422, f"{name} has {len(texts)} entries; expected 1 to {self.limits.texts}")
        return [self._check_text(text, name) for text in texts]

    def _check_text(self, text: str, name: str) -> str:
        text = text.strip()
        if not text:
            raise HTTPException(422, f"{name} is empty; expected words")
        if len(text) > self.limits.characters:
            raise HTTPException(422, f"{name} has {len(text)} characters; expected at most {self.limits.characters}")
        return text
