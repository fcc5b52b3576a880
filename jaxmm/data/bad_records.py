"""Records that cannot be used: why, how many, and when they are too many."""

from collections import Counter
from typing import Any

import numpy as np

from jaxmm.data.base import DataError, Record, Source, record_key

Batch = dict[str, np.ndarray]

REASONS = ("empty", "not an image", "too large", "truncated", "corrupt", "unreadable", "no text", "no label",
           "no answer", "no image")
"""Why a record can be unusable. `fault` in a batch is 1 + the number in this list, 0 for a good record."""


class BadRecord(Exception):
    """A record that cannot be used: `reason` is one of `REASONS`, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def read_record(source: Source, index: int) -> Record:
    """A record; whatever goes wrong, but for want of memory, is a `BadRecord`."""
    try:
        return source[index]
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # sources read files and foreign formats, which fail in many ways
        raise BadRecord("unreadable", f"{type(error).__name__}: {error}") from None


class FaultCounter:
    """Counts the bad records that batches met, by reason, and stops a run that met too many.

    `counts` (by reason), `seen` and `examples` (the first few as (key, reason)) are for reports.
    """

    def __init__(self, source: Source, max_bad: float, *, least: int = 200, keep: int = 5):
        self.source, self.max_bad, self.least, self.keep = source, max_bad, least, keep
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.examples: list[tuple[str, str]] = []

    def update(self, batch: Batch) -> None:
        """Adds a batch; raises `DataError` when more than `max_bad` of at least `least` records were bad."""
        self.seen += int((batch["mask"] | (batch["fault"] > 0)).sum()) if "mask" in batch else len(batch["fault"])
        for row in np.flatnonzero(batch["fault"]):
            reason = REASONS[int(batch["fault"][row]) - 1]
            self.counts[reason] += 1
            if len(self.examples) < self.keep:
                self.examples.append((record_key(self.source, int(batch["drawn"][row])), reason))
        if self.seen >= self.least and self.bad > self.max_bad * self.seen:
            raise DataError(f"{self.summary()}; data.max_bad allows a share of {self.max_bad}")

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes, as plain JSON values."""
        return {"seen": self.seen, "counts": dict(self.counts), "examples": list(self.examples)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on counting from what `get_state` gave."""
        self.seen, self.counts = state["seen"], Counter(state["counts"])
        self.examples = [tuple(example) for example in state["examples"]]

    @property
    def bad(self) -> int:
        """How many records were bad."""
        return self.counts.total()

    def summary(self) -> str:
        """One line for people."""
        text = f"source {self.source.name!r}: {self.bad} of {self.seen} records were bad"
        if not self.bad:
            return text
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{text} ({reasons}; first {', '.join(f'{key}: {reason}' for key, reason in self.examples)})"
