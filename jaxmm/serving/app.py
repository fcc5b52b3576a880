"""The web application: the page, the endpoints, health and metrics."""

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException

from jaxmm.pages import render_page
from jaxmm.serving.batch_queue import QueueFull
from jaxmm.serving.endpoints import model_router
from jaxmm.serving.model_service import ModelService
from jaxmm.serving.request_guard import RequestGuard, problem

log = logging.getLogger(__name__)

POLICY = {"Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
"""What the page may load: nothing from elsewhere."""


def make_app(service: ModelService, *, token: str | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """Return the application of a model.

    With `token`, all but the empty page, its documentation and `/health` need it. `hosts` are the names by which
    browsers may call the server (None: any): with those of the loopback interface, no web site can read the answers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title=f"jaxmm serve: {service.name}", docs_url=None, redoc_url=None, lifespan=lifespan,
                  description="Each request is a form with an image or a text; each answer is JSON.")
    app.add_middleware(RequestGuard, limits=service.limits, metrics=service.metrics, token=token, hosts=hosts)
    app.include_router(model_router(service))

    app.state.service = service

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server is running, what it serves and how many requests wait."""
        return {"status": "ok", "model": service.name, "endpoints": service.offers, "waiting": service.queue.waiting}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return metrics in Prometheus' format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("serving/demo.html.jinja", service, token=token is not None)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return _page("serving/docs.html.jinja", service, schema=app.openapi(), address=str(request.base_url)[:-1],
                     token=token is not None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(422, _sentence(error.errors()[0]))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return problem(503, str(error), {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return problem(500, "the server failed to answer this request; its log says why")

    return app


def _page(template: str, service: ModelService, **values: Any) -> HTMLResponse:
    return HTMLResponse(render_page(template, title=service.name, kind="jaxmm serve", service=service, **values),
                        headers=POLICY)


def _sentence(error: Any) -> str:
    name = error["loc"][-1]
    if error["type"] == "missing":
        return f"{name} is missing"
    if name == "image":
        return "image is a text; expected an uploaded file"
    return f"{name} cannot be used: {error['msg']}"
