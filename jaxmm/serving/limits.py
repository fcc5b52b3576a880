"""Limits of what a server accepts."""

from dataclasses import dataclass
from typing import Annotated

from jaxmm.inference.model import BATCH
from jaxmm.validation import POSITIVE, Limit, check_types


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of all of them together."""

    body: Annotated[int, POSITIVE] = 20_000_000
    """Bytes of a request, its image included."""
    pixels: Annotated[int, POSITIVE] = 50_000_000
    """Pixels of an image; the header decides, before anything is decoded."""
    texts: Annotated[int, POSITIVE] = 64
    """Labels or texts of a request."""
    characters: Annotated[int, POSITIVE] = 1000
    """Characters of a text."""
    seconds: Annotated[float, POSITIVE] = 60.0
    """Time to send a request."""
    waiting: Annotated[int, POSITIVE] = 128
    """Requests that are not answered yet; more are refused with status 503."""
    batch: Annotated[int, Limit(f"1 to {BATCH}", lambda value: 1 <= value <= BATCH)] = 16
    """Requests that are computed together."""
    collect: Annotated[float, Limit("0 or more", lambda value: value >= 0)] = 0.004
    """Seconds that the first request of a batch waits for others."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "limits")
