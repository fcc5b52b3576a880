"""Name the reasons why records cannot be used, count them, and stop a run that meets too many."""

from collections import Counter
from typing import Any

import numpy as np

from jaxmm.data.base import DataError, Record, Source, record_key
from jaxmm.data.cleaning import clean, cleaned_record

Batch = dict[str, np.ndarray]

REASONS = ("empty", "not an image", "too large", "truncated", "corrupt", "unreadable", "no text", "no label",
           "no answer", "no image", "malformed")
"""Reasons why a record cannot be used. `fault` in a batch is 1 + the position in this list, 0 for a good record."""


class BadRecord(Exception):
    """A record that cannot be used: `reason` is one of `REASONS`, `detail` is for people."""

    def __init__(self, reason: str, detail: str = ""):
        detail = clean(detail)
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def read_record(source: Source, index: int) -> Record:
    """Read a record and clean its texts and names. Raises `BadRecord` for every error but `MemoryError`."""
    try:
        return cleaned_record(source[index])
    except (BadRecord, MemoryError):
        raise
    except Exception as error:  # sources read files and foreign formats, which fail in many ways
        raise BadRecord("unreadable", f"{type(error).__name__}: {error}") from None


class FaultCounter:
    """Counts the bad records in batches, by reason, and stops a run that meets too many.

    `counts` (by reason), `records` (all) and `examples` (the first few as (key, reason)) are for reports.
    """

    def __init__(self, source: Source, max_bad: float, *, least: int = 200, keep: int = 5):
        self.source, self.max_bad, self.least, self.keep = source, max_bad, least, keep
        self.records = 0
        self.counts: Counter[str] = Counter()
        self.examples: list[tuple[str, str]] = []

    def update(self, batch: Batch) -> None:
        """Add a batch. Raises `DataError` if more than a share `max_bad` of at least `least` records were bad."""
        real = batch["mask"] | (batch["fault"] > 0) if "mask" in batch else np.ones_like(batch["fault"], bool)
        self.records += int(real.sum())
        for row in np.flatnonzero(batch["fault"]):
            reason = REASONS[int(batch["fault"][row]) - 1]
            self.counts[reason] += 1
            if len(self.examples) < self.keep:
                self.examples.append((record_key(self.source, int(batch["drawn"][row])), reason))
        if self.records >= self.least and self.bad > self.max_bad * self.records:
            raise DataError(f"{self.summary()}; data.max_bad allows a share of {self.max_bad}")

    def get_state(self) -> dict[str, Any]:
        """Return the counts as plain JSON values, for `set_state`."""
        return {"seen": self.records, "counts": dict(self.counts), "examples": list(self.examples)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the counts that `get_state` returned."""
        self.records, self.counts = state["seen"], Counter(state["counts"])
        self.examples = [tuple(example) for example in state["examples"]]

    @property
    def bad(self) -> int:
        """The number of bad records."""
        return self.counts.total()

    def summary(self) -> str:
        """Return the counts as one line of text."""
        text = f"source {self.source.name!r}: {self.bad} of {self.records} records were bad"
        if not self.bad:
            return text
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{text} ({reasons}; first {', '.join(f'{key}: {reason}' for key, reason in self.examples)})"
