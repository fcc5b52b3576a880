"""Worker processes that are killed, end or hang: the same batches, or an error that says so, and no process left."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data import pipeline
from jaxmm.data.base import DataError, Source
from jaxmm.data.pipeline import step_records, train_batches
from tests.data.test_pipeline import assert_same, take

COUNT, PATIENCE = 100, 60


class Faulty(Source):
    """Random images. The `faults` of a record happen one after the other, whenever it is read, and leave `marks`."""

    name, fingerprint = "faulty", "f"

    def __init__(self, faults, marks):
        self.faults, self.marks = faults, marks

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        for number, fault in enumerate(self.faults.get(index, ())):
            mark = self.marks / f"{index}-{number}-{fault}"
            if not mark.exists():
                mark.touch()
                FAULTS[fault]()
        return {"key": str(index), "image": np.random.default_rng(index).integers(256, size=(9, 8, 3), dtype=np.uint8)}


FAULTS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "ended": lambda: os._exit(3),
          "exit": lambda: sys.exit(0), "hangs": lambda: threading.Event().wait()}


def config(workers=1):
    return DataConfig(batch_size=6, workers=workers, image=ImageConfig(size=16))


def drawn(step):
    """The third record of a batch."""
    return int(step_records(COUNT, 6, 5, step)[2])


@pytest.fixture
def nothing_left():
    yield
    assert multiprocessing.active_children() == []


def test_after_a_kill_and_a_hang_the_batches_are_the_same(tmp_path, monkeypatch, caplog, nothing_left):
    """The second worker hangs beyond what it reads ahead."""
    expected = take(train_batches(Faulty({}, tmp_path), config(workers=0), seed=5), 12)
    source = Faulty({drawn(1): ["killed"], drawn(10): ["hangs"]}, tmp_path)

    class Answers(queue.SimpleQueue):
        """Answers whose time limit is over as soon as a worker hangs and nothing comes any more."""

        def get(self, timeout):
            assert timeout == pipeline.PATIENCE
            for _ in range(100 * PATIENCE):
                try:
                    return super().get(timeout=0.01)
                except queue.Empty:
                    if (tmp_path / f"{drawn(10)}-0-hangs").exists() and not caplog.text.count("no batch within"):
                        raise
            raise AssertionError("it hangs")

    monkeypatch.setattr(pipeline, "queue", SimpleNamespace(SimpleQueue=Answers, Empty=queue.Empty))
    for batch, theirs in zip(take(train_batches(source, config(), seed=5), 12), expected, strict=True):
        assert_same(batch, theirs)
    first, second = caplog.messages
    assert first.startswith("worker processes are started again at batch") and "exit code -9" in first
    assert "no batch within 600 s" in second
    assert len(list(tmp_path.iterdir())) == 2                              # both happened, once each


def test_workers_that_fail_twice_end_the_run(tmp_path, caplog, nothing_left):
    source = Faulty({drawn(0): ["killed", "ended"]}, tmp_path)
    with pytest.raises(DataError, match=r"^source 'faulty': worker processes failed twice at batch 0: .*exit code 3"):
        next(train_batches(source, config(), seed=5))


def test_a_source_that_exits_is_an_error(tmp_path):
    """The exit of a thread would end the run as if that were over."""
    source = Faulty({drawn(0): ["exit"]}, tmp_path)
    with pytest.raises(DataError, match=r"^source 'faulty' called sys\.exit\(0\)"):
        next(train_batches(source, config(workers=0), seed=5))


def test_a_source_that_does_not_pickle_is_named(tmp_path, nothing_left):
    source = Faulty({}, tmp_path)
    source.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock' object"):
        next(train_batches(source, config(), seed=5))
