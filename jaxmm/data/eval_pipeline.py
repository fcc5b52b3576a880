"""Evaluation batches: all records once, in order, and all captions."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data import transforms
from jaxmm.data.bad_records import REASONS, BadRecord, Batch, FaultCounter
from jaxmm.data.base import DataError, Source, record_texts
from jaxmm.data.pipeline import prefetched
from jaxmm.data.rows import Shard, host_rows, image_shape, load_row, load_rows, stack_rows, text_id, transform_images

log = logging.getLogger(__name__)


def eval_batches(
    source: Source, config: DataConfig, batch_size: int, tokenizer: Any = None, *, shard: Shard = (0, 1)
) -> Iterator[Batch]:
    """Yield all records once, in order, like `train_batches` but with the evaluation crop and the first caption.

    `mask` bool [b] is False for bad records and for the padding of the last batch; their images are black. Raises
    `DataError` at the end if no record was good.
    """
    return counted(source, eval_rows(source, config, batch_size, tokenizer, shard=shard))


def eval_rows(
    source: Source, config: DataConfig, batch_size: int, tokenizer: Any = None, *, shard: Shard = (0, 1)
) -> Iterator[Batch]:
    """Yield batches like `eval_batches`, without counting bad records."""
    load = EvalBatch(source, config.image, tokenizer, batch_size, host_rows(batch_size, shard))
    batches = grain.MapDataset.range(len(source)).batch(batch_size).map(load)
    return iter(prefetched(batches, len(load.rows), image_shape(source, config.image)))


def counted(source: Source, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield `batches` of all records of `source` and log how many were bad. Raises `DataError` if all were."""
    faults = FaultCounter(source, max_bad=1.0)
    for batch in batches:
        faults.update(batch)
        yield batch
    if faults.records and faults.bad == faults.records:
        raise DataError(faults.summary())
    if faults.bad:
        log.warning("%s; they are left out", faults.summary())


def read_images(
    source: Source, image: ImageConfig, indices: Iterable[int]
) -> tuple[list[int], UInt8[np.ndarray, "n s s 3"]]:
    """Return those of the records `indices` that can be read, and their images as evaluation resizes them.

    Raises `DataError` if there are none.
    """
    read, images = [], []
    for index in indices:
        with contextlib.suppress(BadRecord):
            row = load_row(source, index, with_text=False, with_label=False, rng=None)
            images.append(transform_images(row["image"], transforms.eval_image, image))
            read.append(index)
    if not images:
        raise DataError(f"source {source.name!r}: none of the images asked for can be read")
    return read, np.stack(images)


def eval_texts(source: Source, tokenizer: Any, batch_size: int) -> Iterator[Batch]:
    """Yield all captions of all records, in order, without reading images if the source allows.

    A batch has `tokens` int32 [b, t], `text_id` int32 [b, 2], `owner` int32 [b] (the record number) and `mask` bool
    [b], False for the padding of the last batch. Records that cannot be read have no captions.
    """
    captions: list[str] = []
    owners: list[int] = []

    def batch() -> Batch:
        count, pad = len(captions), batch_size - len(captions)
        return {
            "tokens": tokenizer([*captions, *[""] * pad]),
            "text_id": np.stack([*map(text_id, captions), *[np.zeros(2, np.int32)] * pad]),
            "owner": np.asarray(owners + [0] * pad, np.int32),
            "mask": np.arange(batch_size) < count,
        }

    for index in range(len(source)):
        try:
            texts = record_texts(source, index)
        except Exception:  # eval_batches counts it
            continue
        for text in texts:
            captions.append(text)
            owners.append(index)
            if len(captions) == batch_size:
                yield batch()
                captions.clear()
                owners.clear()
    if captions:
        yield batch()


@dataclass(frozen=True)
class EvalBatch:
    """Loads this host's rows of an evaluation batch and pads the last one."""

    source: Source
    image: ImageConfig
    tokenizer: Any
    batch_size: int
    rows: range

    def __call__(self, indices: np.ndarray) -> Batch:
        """Load the records `indices`, up to `batch_size`."""
        def load(row: int) -> dict[str, Any]:
            return self._row(int(indices[row])) if row < len(indices) else self._blank(0)

        return stack_rows(load_rows(self.source, load, self.rows), self.tokenizer)

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row = load_row(self.source, index, self.tokenizer is not None, True, None)
        except BadRecord as error:
            return self._blank(index) | {"fault": 1 + REASONS.index(error.reason)}
        row["image"] = transform_images(row["image"], transforms.eval_image, self.image)
        return row | {"index": index, "drawn": index, "fault": 0, "mask": True}

    def _blank(self, index: int) -> dict[str, Any]:
        row = {"image": np.zeros(image_shape(self.source, self.image), np.uint8), "image_id": np.zeros(2, np.int32),
               "index": index, "drawn": index, "fault": 0, "mask": False}
        if self.source.classes is not None:
            row["label"] = 0
        return row | ({"texts": ("",)} if self.tokenizer is not None else {})
