"""Check requests before they are read: token, host, size and time. Count them when they are answered."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from jaxmm.serving.limits import Limits
from jaxmm.serving.server_metrics import ServerMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/health", "/docs", "/openapi.json")
"""Paths that need no token: they tell nothing about images."""
DISCARDED = 10
"""How often the limit of a body is read and thrown away, so that the client, which is still sending, gets the answer.
"""
PORT = re.compile(r":\d*$")
UTF8 = re.compile(rb'charset="?utf-8"?')
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


def problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer to a request that failed."""
    return JSONResponse({"error": sentence}, status, headers)


class RequestGuard:
    """ASGI middleware. `hosts` are the names by which browsers may call the server (None: any)."""

    def __init__(self, app: Any, *, limits: Limits, metrics: ServerMetrics, token: str | None,
                 hosts: Collection[str] | None):
        self._app, self._limits, self._metrics, self._token, self._hosts = app, limits, metrics, token, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, body = time.perf_counter(), 500, _Body(receive, self._limits)

        async def count_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            refused = self._refuse(scope)
            if refused is None:
                await self._app(scope, body.receive, count_status)
            else:
                await body.discard()
                await refused(scope, receive, count_status)
        finally:
            self._metrics.count_request(getattr(scope.get("route"), "path", "other"), status,
                                        time.perf_counter() - start)

    def _refuse(self, scope: Message) -> JSONResponse | None:
        headers = dict(scope["headers"])
        host = PORT.sub("", headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            return problem(400, f"this server is called by another name; expected {' or '.join(sorted(self._hosts))} "
                           "(with --host 0.0.0.0 any)")
        if self._hosts is not None and scope["path"] not in OPEN and headers.get(b"sec-fetch-site") in (
                b"cross-site", b"same-site"):
            return problem(403, "this request comes from another web site; expected the page of this server")
        if any(name == b"content-type" and b"charset" in UTF8.sub(b"", value.lower())
               for name, value in scope["headers"]):  # Python decodes some, such as punycode, in quadratic time
            return problem(415, "the form has another charset; expected UTF-8")
        given = headers.get(b"authorization", b"")
        if self._token is not None and scope["path"] not in OPEN and not secrets.compare_digest(
                given, f"Bearer {self._token}".encode()):
            return problem(401, "the token is missing or wrong; expected the header Authorization: Bearer TOKEN",
                           {"WWW-Authenticate": "Bearer"})
        return None


class _Body:
    """The body of a request, up to the limits of its size and time."""

    def __init__(self, receive: Receive, limits: Limits):
        self._receive, self._limits = receive, limits
        self._read, self._ended, self._due = 0, False, time.monotonic() + limits.seconds

    async def receive(self) -> Message:
        """Return the next message; raise `HTTPException` if the body is too large or too slow."""
        message = await self._next()
        if self._read > self._limits.body:
            await self.discard()
            raise HTTPException(413, f"the request is too large; expected at most {self._limits.body:,} bytes")
        return message

    async def discard(self) -> None:
        """Read what the client still sends, within limits."""
        try:
            while not self._ended and self._read <= DISCARDED * self._limits.body:
                await self._next()
        except HTTPException:
            self._ended = True

    async def _next(self) -> Message:
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout(self._due - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the request took longer than {self._limits.seconds:g} s to send") from None
        self._read += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        return message
