"""JSON endpoints of what a model can do. Requests are forms, as `curl -F image=@cat.jpg` sends them."""

from collections.abc import AsyncIterator
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, File, Form, HTTPException, Path, Response, UploadFile
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from jaxmm.serving.model_service import ModelService

Image = Annotated[UploadFile, File(description="A JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000 file.")]
Top = Annotated[int, Form(ge=1, le=1000, description="Most results.")]


class Problem(BaseModel):
    """The answer to a request that failed: one sentence."""

    error: str


class ScoredText(BaseModel):
    """A caption or an answer with its score, the mean log-probability per token."""

    text: str
    score: float


class TextProbability(BaseModel):
    """A text or a label with its probability."""

    text: str
    probability: float


class WordMap(BaseModel):
    """A word, and rows of its attention to the patches of the image; more attention is a larger number."""

    word: str
    map: list[list[float]]


class Attention(BaseModel):
    """The words of a text with their attention to the image. `image` is what the model reads, as a data URI."""

    text: str
    image: str
    words: list[WordMap]


class SearchResult(BaseModel):
    """An image of the index: its number for `/images/NUMBER`, the name of its file, its cosine with the query."""

    number: int
    name: str
    score: float


def model_router(service: ModelService) -> APIRouter:
    """Return the endpoints of what the model of `service` offers."""
    bearer = HTTPBearer(auto_error=False, description="Only if the server has a token.")  # for the schema
    router = APIRouter(dependencies=[Depends(bearer)], responses={
        status: {"model": Problem, "description": text} for status, text in (
            (401, "Wrong token"), (413, "Too large"), (422, "Not usable"), (503, "Too many requests wait"))})

    async def place() -> AsyncIterator[None]:
        with service.queue.place():
            yield

    placed = Depends(place, scope="function")  # given back before the answer is sent: who does not read it keeps none

    async def prepared(image: Image, _: Annotated[None, placed]) -> np.ndarray:
        return await service.read_image(image.file)

    pixels = Annotated[np.ndarray, Depends(prepared)]

    if "caption" in service.offers:
        @router.post("/caption")
        async def caption(image: pixels, top: Top = 1) -> list[ScoredText]:
            """Caption an image: the best captions, best first."""
            return _scored(await service.caption(image, top))

    if "attention" in service.offers:
        @router.post("/attention")
        async def attention(
            image: pixels, text: Annotated[str | None, Form(description="Default: the model's caption.")] = None,
        ) -> Attention:
            """Show where the model looks in the image for each word of a text."""
            text, shown, words = await service.attention(image, text)
            return Attention(text=text, image=shown, words=[
                WordMap(word=word, map=np.round(weights.astype(float), 6).tolist()) for word, weights in words])

    if "answer" in service.offers:
        @router.post("/answer")
        async def answer(image: pixels, question: Annotated[str, Form()], top: Top = 1) -> list[ScoredText]:
            """Answer a question about an image: the best answers, best first."""
            return _scored(await service.answer(image, question, top))

    if "match" in service.offers:
        @router.post("/match")
        async def match(
            image: pixels, texts: Annotated[list[str], Form(description="Repeat the field for several.")],
        ) -> list[TextProbability]:
            """Return the probability that each text belongs to the image, in the order of the texts."""
            return _probable(await service.match(image, texts))

    if "classify" in service.offers:
        expected = "None: the classes are the model's." if service.own_classes else "Repeat the field for several."

        @router.post("/classify")
        async def classify(
            image: pixels, labels: Annotated[tuple[str, ...], Form(description=expected)] = (), top: Top = 5,
        ) -> list[TextProbability]:
            """Classify an image: the likeliest labels, best first."""
            return _probable(await service.classify(image, labels, top))

    if "search" in service.offers:
        @router.post("/search")
        async def search(
            _: Annotated[None, placed],
            text: Annotated[str | None, Form(description="Words to look for.")] = None,
            image: Annotated[UploadFile | None, File(description="Instead of a text.")] = None, top: Top = 12,
        ) -> list[SearchResult]:
            """Search the images of the index by a text or by an image."""
            if (text is None) == (image is None):
                raise HTTPException(422, "expected a text or an image, not both")
            query = text if image is None else await service.read_image(image.file)
            return [SearchResult(number=number, name=name, score=score)
                    for number, name, score in await service.search(query, top)]

        @router.get("/images/{number}", response_class=Response, responses={200: {"content": {"image/webp": {}}}})
        async def images(number: Annotated[int, Path(ge=0)]) -> Response:
            """Return an image of the index, made smaller, as WebP."""
            return Response(await service.thumbnail(number), media_type="image/webp",
                            headers={"Cache-Control": "private, max-age=3600"})

    return router


def _scored(rows: list[tuple[str, float]]) -> list[ScoredText]:
    return [ScoredText(text=text, score=score) for text, score in rows]


def _probable(rows: list[tuple[str, float]]) -> list[TextProbability]:
    return [TextProbability(text=text, probability=probability) for text, probability in rows]
