"""Batches that depend on the seed and the step only: the same for any workers, hosts and restarts.

Batch k holds the records at positions k·b to k·b + b - 1 of an endless order: a new permutation of the source every
epoch, one after the other, so that a batch may reach into the next epoch and no record is dropped or repeated within
one. Grain runs it: its data set is the step numbers, mapped to whole batches, so that the cost of a Grain element is
paid once a batch, and any step is reached at once.
"""

import functools
import hashlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle
from jaxtyping import Int

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data import images, transforms
from jaxmm.data.bad_records import REASONS, BadRecord, Batch, FaultCounter, read_record
from jaxmm.data.base import DataError, Record, Source, record_key, record_texts
from jaxmm.data.processes import start_worker
from jaxmm.data.sources import vqa

log = logging.getLogger(__name__)

Shard = tuple[int, int]
"""(this host, hosts): host h of H gets the h-th of H equal runs of rows of every batch."""

TRIES = 50
"""So many records in a row that are all bad end the run: no source that is worth training on has them."""
PREFETCH_BYTES = 2**31
"""Decoded batches that may wait in memory, about."""


def step_records(length: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, "b"]:
    """The record numbers, of a source of `length`, whose turn it is in training batch `step`, over all hosts."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), length)
    records = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        where = epochs == epoch
        if length <= 2**16:
            records[where] = _permutation(length, seed, epoch)[places[where]]
        else:  # without memory of its length; takes a millisecond a number where the length is small
            key = int(_epoch_seed(seed, epoch).generate_state(1)[0])
            records[where] = [index_shuffle(place, max_index=length - 1, seed=key, rounds=4)
                              for place in places[where].tolist()]
    return records


@functools.lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(_epoch_seed(seed, epoch)).permutation(length)


def _epoch_seed(seed: int, epoch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(epoch,))  # a spawn key is apart from what the rows are seeded with


def train_batches(
    source: Source, config: DataConfig, tokenizer: Any = None, *, seed: int, shard: Shard = (0, 1), labels: bool = True
) -> "TrainIterator":
    """Endless training batches, starting at step 0; `set_state({"step": k})` goes to step k at once.

    A batch has `image` uint8 [b, size, size, 3] ([b, 2, size, size, 3] where a record has two pictures), `image_id`
    int32 [b, 2], `index`, `drawn` and `fault` int32 [b]; with a tokenizer `tokens` int32 [b, t] and `text_id` int32
    [b, 2] of one caption of each picture, drawn by chance; with `labels`, if the source has classes, `label` int32
    [b]. `drawn` is the record whose turn it was and `index` the one in the batch: another one, drawn by chance, where
    `fault` says that the first was bad. Where records have questions, `tokens` are the question's, and there are
    `answers` and `answer_weight` (see `vqa.answer_arrays`); all three have an axis more, after the first, where
    `config.questions` is not 1.

    Raises `DataError` when the batch does not divide over the hosts; the iterator raises it when `TRIES` records in a
    row are bad.
    """
    answering = None
    if hasattr(source, "most_answers") and tokenizer is not None:
        answering = tokenizer.at_length(config.tokenizer.answer_length)
    return TrainIterator(TrainBatch(source, config, tokenizer, seed, _rows(config.batch_size, shard), labels,
                                    answering))


def eval_batches(
    source: Source, config: DataConfig, batch_size: int, tokenizer: Any = None, *, shard: Shard = (0, 1)
) -> Iterator[Batch]:
    """All records once, in order, as `train_batches` gives them but with the evaluation crop and the first caption.

    `mask` bool [b] is False for bad records and for the rows that fill up the last batch; their pictures are black.
    Raises `DataError` at the end when not one record was good.
    """
    return counted(source, eval_rows(source, config, batch_size, tokenizer, shard=shard))


def eval_rows(
    source: Source, config: DataConfig, batch_size: int, tokenizer: Any = None, *, shard: Shard = (0, 1)
) -> Iterator[Batch]:
    """As `eval_batches`, but bad records are nobody's concern."""
    load = EvalBatch(source, config.image, tokenizer, batch_size, _rows(batch_size, shard))
    batches = grain.MapDataset.range(len(source)).batch(batch_size).map(load)
    return iter(_iterate(batches, _batch_bytes(load.rows, _image_shape(source, config.image))))


def counted(source: Source, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` of all records of `source`; says how many were bad, and raises `DataError` when all were."""
    faults = FaultCounter(source, max_bad=1.0)
    for batch in batches:
        faults.update(batch)
        yield batch
    if faults.seen and faults.bad == faults.seen:
        raise DataError(faults.summary())
    if faults.bad:
        log.warning("%s; they are left out", faults.summary())


def eval_texts(source: Source, tokenizer: Any, batch_size: int) -> Iterator[Batch]:
    """All captions of all records, in order, without reading pictures where the source allows.

    A batch has `tokens` int32 [b, t], `text_id` int32 [b, 2], `owner` int32 [b] (the record number) and `mask` bool
    [b], False for the rows that fill up the last batch. Records that cannot be read have no captions.
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


def image_id(record: Record) -> Int[np.ndarray, "2"]:
    """64 bits that are the same for the same picture: of its `image_id`, else of its bytes."""
    if "image_id" in record:
        return _hash(hashlib.blake2b, record["image_id"].encode(errors="replace"))
    data = record["image"] if isinstance(record["image"], tuple) else (record["image"],)
    # SHA-1 is twice as fast as BLAKE2 on processors that have it built in
    return _hash(hashlib.sha1, b"".join(one.tobytes() if isinstance(one, np.ndarray) else one for one in data))


def text_id(text: str) -> Int[np.ndarray, "2"]:
    """64 bits that are the same for the same words, whatever their case and white space."""
    return _hash(hashlib.blake2b, " ".join(text.lower().split()).encode(errors="replace"))


class TrainIterator(grain.DatasetIterator):
    """Training batches in order. Its state is the step and what the data was, whatever the workers and hosts."""

    def __init__(self, load: "TrainBatch"):
        super().__init__()
        self._load = load
        self._step = 0
        self._running: list[grain.DatasetIterator] = []  # one from the first batch on
        weakref.finalize(self, _close, self._running)  # also at exit, before what workers need is torn down

    def __next__(self) -> Batch:
        load, config = self._load, self._load.config
        if not self._running:
            batches = grain.MapDataset.range(self._step, 2**62).map(load)
            shape = _image_shape(load.source, config.image)
            self._running.append(_iterate(batches, _batch_bytes(load.rows, shape), config.workers))
        try:
            batch = next(self._running[0])
        except DataError as error:  # as one message, without Grain's notes on workers and threads
            raise DataError(str(error)) from None
        self._step += 1
        if config.workers:  # they come in shared memory, which must not outlive the workers
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes: the number of the next batch, and what must be the same for it to be the same."""
        load = self._load
        return {"step": self._step, "seed": load.seed, "batch_size": load.config.batch_size,
                "records": len(load.source), "fingerprint": load.source.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a step. Raises `DataError` if the state is of other data, another seed or another batch size."""
        here = self.get_state() | {"step": state["step"]}
        changed = [f"{name} was {value!r} and is {here.get(name)!r}" for name, value in state.items()
                   if here.get(name) != value]
        if changed:
            raise DataError(f"source {self._load.source.name!r} is not what this run began with: {'; '.join(changed)}")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the workers; the next batch would start them again."""
        while self._running:
            self._running.pop().close()


@dataclass(frozen=True)
class TrainBatch:
    """Loads this host's rows of a training batch. Every row has its own randomness, from the seed and its position."""

    source: Source
    config: DataConfig
    tokenizer: Any
    seed: int
    rows: range
    labels: bool
    answering: Any = None
    """The tokenizer of answers."""

    def __call__(self, step: int) -> Batch:
        """Loads batch `step`."""
        size = self.config.batch_size
        drawn = step_records(len(self.source), size, self.seed, step)
        rows = [self._row(step * size + row, int(drawn[row])) for row in self.rows]
        batch = _stack(rows, self.tokenizer)
        if "answers" in rows[0]:
            batch |= self._asked(rows, batch["tokens"])
        return batch

    def _asked(self, rows: list[dict[str, Any]], first: np.ndarray) -> Batch:
        """The questions' tokens, of which those that were drawn are there already, and their answers."""
        b, count = len(rows), self.config.questions
        answers = vqa.answer_arrays(
            [each for row in rows for each in (row["answers"], *(told for _, told in row.get("others", ())))],
            self.answering, self.source.most_answers)
        if count == 1:
            return answers
        others = self.tokenizer([question for row in rows for question, _ in row["others"]])
        tokens = np.concatenate([first[:, None], others.reshape(b, count - 1, -1)], axis=1)
        return {"tokens": tokens} | {name: each.reshape(b, count, *each.shape[1:]) for name, each in answers.items()}

    def _row(self, position: int, drawn: int) -> dict[str, Any]:
        fault = 0
        for attempt in range(TRIES):
            rng = np.random.default_rng((self.seed, position, attempt))
            index = int(rng.integers(len(self.source))) if attempt else drawn
            try:
                row = _load(self.source, index, self.tokenizer is not None, self.labels, rng)
                if self.config.questions > 1:
                    row["others"] = self.source.others(index, self.config.questions - 1, rng)
                row["image"] = _each(row["image"], transforms.train_image, self.config.image, rng)
            except BadRecord as error:
                fault, last = fault or 1 + REASONS.index(error.reason), error
                continue
            return row | {"index": index, "drawn": drawn, "fault": fault}
        raise DataError(f"source {self.source.name!r}: {TRIES} records in a row cannot be used; the last was "
                        f"{record_key(self.source, index)}: {last}")


@dataclass(frozen=True)
class EvalBatch:
    """Loads this host's rows of an evaluation batch and fills up the last one."""

    source: Source
    image: ImageConfig
    tokenizer: Any
    batch_size: int
    rows: range

    def __call__(self, indices: np.ndarray) -> Batch:
        """Loads the records `indices`, up to `batch_size`."""
        rows = [self._row(int(indices[row])) if row < len(indices) else self._blank(0) for row in self.rows]
        return _stack(rows, self.tokenizer)

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row = _load(self.source, index, self.tokenizer is not None, True, None)
        except BadRecord as error:
            return self._blank(index) | {"fault": 1 + REASONS.index(error.reason)}
        row["image"] = _each(row["image"], transforms.eval_image, self.image)
        return row | {"index": index, "drawn": index, "fault": 0, "mask": True}

    def _blank(self, index: int) -> dict[str, Any]:
        row = {"image": np.zeros(_image_shape(self.source, self.image), np.uint8), "image_id": np.zeros(2, np.int32),
               "index": index, "drawn": index, "fault": 0, "mask": False}
        if self.source.classes is not None:
            row["label"] = 0
        return row | ({"text": ""} if self.tokenizer is not None else {})


def _load(source: Source, index: int, with_text: bool, with_label: bool, rng: np.random.Generator | None
          ) -> dict[str, Any]:
    """Reads and decodes a record and takes one of its captions: by chance, or the first. Raises `BadRecord`."""
    record = read_record(source, index)
    if rng is not None and hasattr(source, "vary"):
        record = source.vary(record, rng)
    row: dict[str, Any] = {}
    if with_text:
        texts = (record["question"],) if "question" in record else record.get("texts", ())
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadRecord("no text", "it has no caption and no question")
        if "question" in record and rng is not None:
            row["answers"] = vqa.weighted(record.get("answers", ()))
            if not row["answers"]:
                raise BadRecord("no answer", "its question has no answer")
        row["text"] = texts[rng.integers(len(texts)) if rng is not None and len(texts) > 1 else 0]
    if with_label and source.classes is not None:
        if not 0 <= record.get("label", -1) < len(source.classes):
            raise BadRecord("no label", f"label {record.get('label')} of {len(source.classes)} classes")
        row["label"] = record["label"]
    if "image" not in record:
        raise BadRecord("no image", "it has no picture")
    image = record["image"]
    decoded = tuple(map(images.decode, image)) if isinstance(image, tuple) else images.decode(image)
    return row | {"image": decoded, "image_id": image_id(record)}


def _each(image: Any, transform: Callable, *args: Any) -> np.ndarray:
    """The transformed picture; of two, both, each by chances of its own."""
    if isinstance(image, tuple):
        return np.stack([transform(one, *args) for one in image])
    return transform(image, *args)


def _stack(rows: list[dict[str, Any]], tokenizer: Any) -> Batch:
    batch = {name: np.stack([row[name] for row in rows]) for name in ("image", "image_id")}
    batch |= {name: np.asarray([row[name] for row in rows], np.int32)
              for name in ("label", "index", "drawn", "fault") if name in rows[0]}
    if tokenizer is not None:
        texts = [row["text"] for row in rows]
        batch |= {"tokens": tokenizer(texts), "text_id": np.stack([text_id(text) for text in texts])}
    if "mask" in rows[0]:
        batch["mask"] = np.asarray([row["mask"] for row in rows], bool)
    return batch


def _iterate(batches: grain.MapDataset, batch_bytes: int, workers: int = 0) -> grain.DatasetIterator:
    """Runs Grain: threads of this process, or worker processes. Either way in order, and a few batches ahead."""
    most = max(2, PREFETCH_BYTES // batch_bytes)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = min(workers, most)
        buffer = max(1, min(4, most // workers))
        return iter(batches.to_iter_dataset(options).mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer), start_worker))
    threads = min(16, os.cpu_count() or 1, most)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)))


def _close(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _rows(batch_size: int, shard: Shard) -> range:
    host, hosts = shard
    if batch_size % hosts or not 0 <= host < hosts:
        raise DataError(f"a batch of {batch_size} does not divide over host {host} of {hosts}")
    share = batch_size // hosts
    return range(host * share, (host + 1) * share)


def _image_shape(source: Source, config: ImageConfig) -> tuple[int, ...]:
    count = getattr(source, "pictures", 1)
    return (*((count,) if count > 1 else ()), config.size, config.size, 3)


def _batch_bytes(rows: range, shape: tuple[int, ...]) -> int:
    return len(rows) * math.prod(shape)


def _hash(function: Callable, data: bytes) -> Int[np.ndarray, "2"]:
    return np.frombuffer(function(data, usedforsecurity=False).digest()[:8], "<i4").astype(np.int32)
