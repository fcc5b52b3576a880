"""Real processes that are killed, and go on as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmm.checkpoints import MANIFEST, Checkpoints
from jaxmm.data.pipeline import step_records
from jaxmm.data.sources.registry import open_source
from tests.training.common import assert_same_bits, lines, restored
from tests.training.process import EVERY, STEPS, config
from tests.xla import flags

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that a process may take for what takes a few."""


class Trainer:
    """A training process in `workdir`."""

    def __init__(self, workdir, shared, *options, devices=1):
        workdir.mkdir(exist_ok=True)
        self.workdir, self.output = workdir, workdir / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.training.process", workdir, shared / "data", "--cache", shared / "cache",
                 *map(str, options)], cwd=ROOT, stdout=file, stderr=file,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(devices)})

    def wait_for(self, condition):
        """Returns once `condition` is true; fails when the process ends first, or after `PATIENCE`."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.002)

    def kill(self):
        self.process.kill()
        assert self.process.wait(PATIENCE) == -signal.SIGKILL

    def ends(self):
        """What it wrote, after it ended well."""
        status, text = self.process.wait(PATIENCE), self.output.read_text()
        assert status == 0, text
        return text


def used(workdir):
    """(step, records) of every batch that was used, again and again if it was."""
    path = workdir / "ledger.jsonl"
    rows = [json.loads(row) for row in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [(row["step"], row["records"]) for row in rows]


def last(workdir):
    return max(Checkpoints(workdir / "checkpoints").steps(), default=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folders of data and of compiled programs."""
    folder = tmp_path_factory.mktemp("shared")
    open_source("scenes:tiny/train", data_dir=str(folder / "data"))
    return folder


@pytest.fixture(scope="module")
def whole(shared):
    """An undisturbed run."""
    trainer = Trainer(shared / "whole", shared)
    trainer.ends()
    return trainer.workdir


def same_run(workdir, whole):
    assert lines(workdir, "train/loss") == lines(whole, "train/loss")
    assert [step for step, _ in lines(workdir, "train/loss")] == list(range(1, STEPS + 1))
    assert_same_bits(restored(workdir, STEPS), restored(whole, STEPS))


def test_killed_again_and_again_a_run_ends_as_if_undisturbed(whole, shared, tmp_path):
    rng = np.random.default_rng(20)
    workdir = tmp_path / "killed"
    workdir.mkdir()
    for how in ("at random", "writing", "at random", "digests"):
        start, done = last(workdir), len(used(workdir))
        if how == "at random":
            more = int(rng.integers(1, 8))
            trainer = Trainer(workdir, shared, "--pause", start + more + 3)
            trainer.wait_for(lambda: len(used(workdir)) >= done + more)    # noqa: B023
            trainer.kill()
        else:
            trainer = Trainer(workdir, shared, "--hold", how)
            trainer.wait_for((workdir / "held").exists)
            trainer.kill()
            (workdir / "held").unlink()
            half = [p for p in (workdir / "checkpoints").iterdir() if not (p / MANIFEST).exists()]
            assert half and last(workdir) == start                         # it was killed in the middle of a save
        assert (f"going on after step {start}" if start else "from the start") in trainer.output.read_text()
    done, stopped = len(used(workdir)), last(workdir) + 2
    trainer = Trainer(workdir, shared, "--pause", stopped)
    trainer.wait_for(lambda: len(used(workdir)) == done + 2)
    trainer.process.terminate()
    assert f"stopped after step {stopped} as asked, everything is saved" in trainer.ends()
    assert last(workdir) == stopped < STEPS
    assert "report: " in Trainer(workdir, shared).ends()

    same_run(workdir, whole)
    assert all((p / MANIFEST).exists() for p in (workdir / "checkpoints").iterdir())
    ledger = used(workdir)
    assert len(ledger) > STEPS                                             # some steps were done again
    batch = config("").data.batch_size
    final = dict(ledger)
    assert list(sorted(final)) == list(range(1, STEPS + 1))
    assert all(records == final[step] for step, records in ledger)         # and with the same records
    order = np.concatenate([final[step] for step in range(1, STEPS + 1)])
    np.testing.assert_array_equal(order, np.concatenate([step_records(160, batch, 3, k) for k in range(STEPS)]))
    for epoch in range(len(order) // 160):
        assert sorted(order[epoch * 160:(epoch + 1) * 160]) == list(range(160))


def test_one_device_and_eight_go_on_with_what_the_other_wrote(whole, shared, tmp_path):
    up, down = tmp_path / "up", tmp_path / "down"
    shutil.copytree(whole, up)
    half = 3 * EVERY
    for step in Checkpoints(up / "checkpoints").steps():
        if step > half:
            shutil.rmtree(up / "checkpoints" / str(step))
    cut = ("--mesh", 2, 2, 2)
    first = Trainer(down, shared, *cut, "--steps", half, devices=8)
    more = Trainer(up, shared, *cut, devices=8)
    assert "from the start" in first.ends()
    assert f"going on after step {half}" in more.ends()
    Trainer(down, shared).ends()
    wanted = lines(whole, "train/loss")
    for workdir in (up, down):
        np.testing.assert_allclose(lines(workdir, "train/loss"), wanted, rtol=1e-5)
