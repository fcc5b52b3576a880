"""Collect requests into batches: one thread computes them, and a limited number of requests may wait."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

Compute = Callable[[list[Any]], Sequence[Any]]
"""Function from several requests to one answer for each."""
RECENT = 0.2
"""Weight of the last batch in the mean time per request."""


class QueueFull(RuntimeError):
    """A request that is refused because too many wait."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting, as many as may; try again in {retry_after} s")
        self.retry_after = retry_after
        """Seconds after which those that wait now should be answered."""


@dataclass(frozen=True, eq=False)
class _Request:
    function: str
    content: Any
    answer: Future
    since: float


class BatchQueue:
    """Computes requests for `functions` in a thread of its own, up to `batch` of the same function at a time.

    The oldest request waits up to `collect` seconds for others to join it. `on_batch` is called after each batch with
    the function's name, the number of requests and the seconds.
    """

    def __init__(self, functions: Mapping[str, Compute], *, batch: int, waiting: int, collect: float,
                 on_batch: Callable[[str, int, float], None] = lambda name, size, seconds: None):
        self._functions, self._batch, self._limit, self._collect = functions, batch, waiting, collect
        self._on_batch = on_batch
        self._requests: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._places, self._pace, self._closed = 0, 0.0, False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that have a place: those that are being decoded, wait, or are being computed."""
        return self._places

    @contextmanager
    def place(self) -> Iterator[None]:
        """Reserve a place for a request until it is answered. Raise `QueueFull` if all are taken."""
        with self._changed:
            if self._places >= self._limit:
                raise QueueFull(self._places, max(1, math.ceil(self._places * self._pace)))
            self._places += 1
        try:
            yield
        finally:
            with self._changed:
                self._places -= 1

    def submit(self, function: str, content: Any) -> Future:
        """Return the future answer of a request. One that is cancelled before its batch begins is left out."""
        request = _Request(function, content, Future(), time.monotonic())
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is stopping")
            self._requests.append(request)
            self._changed.notify_all()
        return request.answer

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            if running := [request for request in batch if request.answer.set_running_or_notify_cancel()]:
                self._compute(running)

    def _next(self) -> list[_Request]:
        """Return the oldest request, with others of its function; none if the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed)
            if not self._requests:
                return []
            first = self._requests[0]

            def alike() -> list[_Request]:
                return [request for request in self._requests if request.function == first.function][:self._batch]

            self._changed.wait_for(lambda: len(alike()) == self._batch or self._closed,
                                   max(0.0, first.since + self._collect - time.monotonic()))
            batch = alike()
            for request in batch:
                self._requests.remove(request)
            return batch

    def _compute(self, batch: list[_Request]) -> None:
        """Answer a batch. If it fails, its requests are computed one by one, so that only the cause fails."""
        function, start = batch[0].function, time.perf_counter()
        try:
            compute = self._functions[function]
            answers = list(zip(batch, compute([request.content for request in batch]), strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            log.warning("a batch of %d failed and is computed one by one: %s", len(batch), error)
            for request in batch:
                self._compute([request])
            return
        seconds = time.perf_counter() - start
        self._pace += RECENT * (seconds / len(batch) - self._pace)
        self._on_batch(function, len(batch), seconds)
        for request, answer in answers:
            request.answer.set_result(answer)
