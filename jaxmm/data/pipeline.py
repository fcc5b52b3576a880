"""Training batches that depend on the seed and the step only: the same for any workers, hosts and restarts.

Batch k has the records at positions k·b to k·b + b - 1 of an endless order: a new permutation of the source in every
epoch, one after the other, so that a batch may reach into the next epoch, and within an epoch no record is dropped or
repeated. Grain runs it. Its data set is the step numbers, mapped to complete batches, so that the cost of one Grain
element is paid once per batch, and any step is reached at once.
"""

import functools
import logging
import math
import multiprocessing
import os
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle
from jaxtyping import Int

from jaxmm.config import DataConfig
from jaxmm.data import transforms
from jaxmm.data.bad_records import REASONS, BadRecord, Batch
from jaxmm.data.base import DataError, Source, record_key
from jaxmm.data.processes import start_worker
from jaxmm.data.rows import Shard, host_rows, image_shape, load_row, load_rows, stack_rows, transform_images
from jaxmm.data.sources.vqa import answer_arrays, answer_shares

log = logging.getLogger(__name__)

TRIES = 50
"""The number of bad records in a row that ends the run."""
PREFETCH_BYTES = 2**31
"""The approximate size of the decoded batches that wait in memory."""
PATIENCE = 600.0
"""Seconds after which worker processes without a batch count as hanging."""


def step_records(length: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, "b"]:
    """Return the numbers of the records, of a source of `length`, in training batch `step`, over all hosts."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), length)
    records = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        rows = epochs == epoch
        if length <= 2**16:
            records[rows] = _permutation(length, seed, epoch)[places[rows]]
        else:  # needs no memory, but a millisecond per number for a small length
            key = int(_epoch_seed(seed, epoch).generate_state(1)[0])
            records[rows] = [index_shuffle(place, max_index=length - 1, seed=key, rounds=4)
                             for place in places[rows].tolist()]
    return records


@functools.lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(_epoch_seed(seed, epoch)).permutation(length)


def _epoch_seed(seed: int, epoch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(epoch,))  # a spawn key differs from all seeds of the rows


def train_batches(
    source: Source, config: DataConfig, tokenizer: Any = None, *, seed: int, shard: Shard = (0, 1), labels: bool = True
) -> "TrainIterator":
    """Return endless training batches, starting at step 0; `set_state({"step": k})` goes to step k at once.

    A batch has `image` uint8 [b, size, size, 3] ([b, 2, size, size, 3] if a record has two images), `image_id` int32
    [b, 2], `index`, `drawn` and `fault` int32 [b]. With a tokenizer it has `tokens` int32 [b, t] and `text_id` int32
    [b, 2] of one caption of each image, drawn at random; of n captions if `config.captions` is n above 1, in another
    axis, after the first. With `labels`, if the source has classes, it has `label` int32
    [b]. `drawn` is the record whose turn it was. `index` is the record in the batch: another random one if the first
    was bad, which `fault` says. If records have questions, `tokens` are the question's, and there are `answers` and
    `answer_weight` (see `answer_arrays`); all three have another axis, after the first, if `config.questions` is not 1.

    Raises `DataError` if the batch does not divide over the hosts. The iterator raises it if `TRIES` records in a row
    are bad.
    """
    answer_tokenizer = None
    if source.most_answers and tokenizer is not None:
        answer_tokenizer = tokenizer.at_length(config.tokenizer.answer_length)
    return TrainIterator(TrainBatch(source, config, tokenizer, seed, host_rows(config.batch_size, shard), labels,
                                    answer_tokenizer))


class TrainIterator(grain.DatasetIterator):
    """Training batches in order. Its state is the step and a description of the data, not the workers and hosts."""

    def __init__(self, load: "TrainBatch"):
        super().__init__()
        self._load = load
        self._step = 0
        self._running: list[grain.DatasetIterator] = []  # one from the first batch on
        self._others: set[multiprocessing.Process] = set()  # processes that are not its workers
        weakref.finalize(self, _close, self._running)  # also at exit, before what workers need is torn down

    def __next__(self) -> Batch:
        try:
            batch = self._read_from_workers() if self._load.config.workers else self._read()
        except DataError as error:  # as one message, without Grain's notes on workers and threads
            raise DataError(str(error)) from None
        self._step += 1
        return batch

    def _read(self) -> Batch:
        """Return the next batch of Grain, which is started by the first call."""
        if not self._running:
            load, self._others = self._load, set(multiprocessing.active_children())
            batches = grain.MapDataset.range(self._step, 2**62).map(load)
            shape = image_shape(load.source, load.config.image)
            self._running.append(prefetched(batches, len(load.rows), shape, load.config.workers))
        return next(self._running[0])

    def _read_from_workers(self) -> Batch:
        """Return the next batch of the workers; start them again, once, if one of them ends or hangs.

        Grain by itself goes on waiting for a worker that hangs.
        """
        for again in (False, True):
            try:
                batch = _within(self._read, PATIENCE)
                # copied out of shared memory, which must not outlive the workers
                return {name: np.array(value) for name, value in batch.items()}
            except (RuntimeError, TimeoutError) as error:
                for worker in set(multiprocessing.active_children()) - self._others:
                    worker.kill()
                self.close()
                if again:
                    raise DataError(f"source {self._load.source.name!r}: worker processes failed twice at batch "
                                    f"{self._step}: {error} For want of memory, use fewer data.workers") from error
                log.warning("worker processes are started again at batch %d: %s", self._step, error)

    def get_state(self) -> dict[str, Any]:
        """Return the number of the next batch and a description of the data, for `set_state`."""
        load = self._load
        return {"step": self._step, "seed": load.seed, "batch_size": load.config.batch_size,
                "records": len(load.source), "fingerprint": load.source.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a step. Raises `DataError` if the state is of other data, another seed or another batch size."""
        here = self.get_state() | {"step": state["step"]}
        changed = [f"{name} was {value!r} and is {here.get(name)!r}" for name, value in state.items()
                   if here.get(name) != value]
        if changed:
            raise DataError(f"source {self._load.source.name!r} is not what this run began with: {'; '.join(changed)}")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """End the workers; the next batch would start them again."""
        while self._running:  # not `_close`, which may be gone at exit
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
    answer_tokenizer: Any = None

    def __call__(self, step: int) -> Batch:
        """Load batch `step`. Raises `DataError` if the source ends its process, which would be a silent end."""
        try:
            return self._load(step)
        except SystemExit as error:
            raise DataError(f"source {self.source.name!r} called sys.exit({error.code})") from None

    def _load(self, step: int) -> Batch:
        size = self.config.batch_size
        drawn = step_records(len(self.source), size, self.seed, step)
        rows = load_rows(self.source, lambda row: self._row(step * size + row, int(drawn[row])), self.rows)
        batch = stack_rows(rows, self.tokenizer)
        if "answers" in rows[0]:
            batch |= self._questions(rows, batch["tokens"])
        return batch

    def _questions(self, rows: list[dict[str, Any]], first: np.ndarray) -> Batch:
        """Return the tokens of all questions, `first` those of the drawn ones, and their answers."""
        b, count = len(rows), self.config.questions
        answers = answer_arrays(
            [shares for row in rows for shares in (row["answers"], *(
                answer_shares(texts) for _, texts in row.get("others", ())))],
            self.answer_tokenizer, self.source.most_answers)
        if count == 1:
            return answers
        others = self.tokenizer([question for row in rows for question, _ in row["others"]])
        tokens = np.concatenate([first[:, None], others.reshape(b, count - 1, -1)], axis=1)
        return {"tokens": tokens} | {name: value.reshape(b, count, *value.shape[1:]) for name, value in answers.items()}

    def _row(self, position: int, drawn: int) -> dict[str, Any]:
        fault = 0
        for attempt in range(TRIES):
            rng = np.random.default_rng((self.seed, position, attempt))
            index = int(rng.integers(len(self.source))) if attempt else drawn
            try:
                row = load_row(self.source, index, self.tokenizer is not None, self.labels, rng, self.config.captions,
                               self.config.origins)
                if self.config.questions > 1:
                    row["others"] = self.source.others(index, self.config.questions - 1, rng)
                row["image"] = transform_images(row["image"], transforms.train_image, self.config.image, rng)
            except BadRecord as error:
                fault, last = fault or 1 + REASONS.index(error.reason), error
                continue
            return row | {"index": index, "drawn": drawn, "fault": fault}
        raise DataError(f"source {self.source.name!r}: {TRIES} records in a row cannot be used; the last was "
                        f"{record_key(self.source, index)}: {last}")


def prefetched(
    batches: grain.MapDataset, rows: int, shape: tuple[int, ...], workers: int = 0
) -> grain.DatasetIterator:
    """Run Grain in threads of this process or in worker processes, in order and a few batches ahead.

    `rows` and the `shape` of one image give the size of a batch in memory.
    """
    most = max(2, PREFETCH_BYTES // (rows * math.prod(shape)))
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


def _within(read: Callable[[], Batch], seconds: float) -> Batch:
    """Return `read()`, called in a thread that a process does not wait for. Raises `TimeoutError` after `seconds`."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def answer():
        try:
            answers.put((read(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=answer, name="batch", daemon=True).start()
    try:
        batch, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no batch within {seconds:.0f} s.") from None
    if error is not None:
        raise error
    return batch


def _close(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()
