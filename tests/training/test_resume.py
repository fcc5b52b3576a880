"""A run that is killed goes on as if nothing had been."""

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

from jaxmm import checkpoints
from jaxmm.checkpoints import MANIFEST, Checkpoints
from jaxmm.data.pipeline import step_records
from jaxmm.training.logs import MetricLog
from tests.training.common import Killed, assert_same_bits, lines, restored
from tests.training.process import EVERY, STEPS, config, run

ROOT = Path(__file__).parents[2]
PATIENCE = 900
"""Seconds that a process may take for what takes a few."""


class Trainer:
    """A training process in `workdir`."""

    def __init__(self, workdir, data, *options, output=None):
        self.workdir, self.output = workdir, (output or workdir) / "output.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.training.process", workdir, data, *map(str, options)], cwd=ROOT,
                stdout=file, stderr=file, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    def wait_for(self, condition):
        """Returns once `condition` is true; fails when the process ends first, or after `PATIENCE`."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.002)

    def kill(self):
        """Kills it; what it wrote."""
        self.process.kill()
        assert self.process.wait(PATIENCE) == -signal.SIGKILL
        return self.output.read_text()


def run_killed_in_a_save(workdir, data_dir, monkeypatch, **options):
    """Train until the first checkpoint is complete but for its manifest, and end there."""
    def end(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, "digests", end)
        run(workdir, data_dir, **options)


def run_until_asked_to_stop(workdir, data_dir, step, monkeypatch, capsys, **options):
    """Train until SIGTERM comes while the metrics of `step` are written."""
    plain = MetricLog.write

    def write(self, at, metrics):
        plain(self, at, metrics)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricLog, "write", write)
        assert run(workdir, data_dir, **options) == {}
    assert "as asked, everything is saved" in capsys.readouterr().err


def used(workdir):
    """(step, records) of every batch that was used, again and again if it was."""
    path = workdir / "ledger.jsonl"
    rows = [json.loads(row) for row in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [(row["step"], row["records"]) for row in rows]


def last(workdir):
    return max(Checkpoints(workdir / "checkpoints").steps(), default=0)


def unfinished(workdir):
    """The folders of saves that were cut short."""
    return [path for path in (workdir / "checkpoints").iterdir() if not (path / MANIFEST).exists()]


def test_killed_again_and_again_a_run_ends_as_if_undisturbed(undisturbed, scenes, tmp_path, monkeypatch, capsys):
    """At random and while Orbax writes, as a process; while digests are taken and when asked to stop, in this one."""
    workdir = tmp_path / "killed"
    workdir.mkdir()
    trainer = Trainer(workdir, scenes, "--pause", 9)
    trainer.wait_for(lambda: len(used(workdir)) >= 6)
    assert "from the start" in trainer.kill()

    start = last(workdir)
    trainer = Trainer(workdir, scenes, "--block")
    trainer.wait_for((workdir / "blocked").exists)
    assert (f"going on after step {start}" if start else "from the start") in trainer.kill()
    assert unfinished(workdir) and last(workdir) == start                  # it was killed in the middle of a save

    run_killed_in_a_save(workdir, scenes, monkeypatch)
    assert unfinished(workdir) and last(workdir) == start
    run_until_asked_to_stop(workdir, scenes, start + 6, monkeypatch, capsys)
    assert start + 6 <= last(workdir) < STEPS
    run(workdir, scenes)
    assert "report: " in capsys.readouterr().err

    assert lines(workdir, "train/loss") == lines(undisturbed, "train/loss")
    assert [step for step, _ in lines(workdir, "train/loss")] == list(range(1, STEPS + 1))
    assert_same_bits(restored(workdir, STEPS), restored(undisturbed, STEPS))
    assert not unfinished(workdir)
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


def shared_memory():
    """The blocks of shared memory of this machine."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def workers(process):
    """The process numbers of the data workers of `process`, none of which ends."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    return [int(number) for number in children if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes()]


@pytest.mark.long
def test_a_killed_worker_and_a_killed_run_leave_nothing(undisturbed, scenes, tmp_path):
    """A killed worker is replaced once what it has read is used up. With the run end its workers and their memory."""
    workdir, before, pause = tmp_path / "workers", shared_memory(), STEPS - 2
    workdir.mkdir()
    trainer = Trainer(workdir, scenes, "--workers", 2, "--kill-worker", 2, "--pause", pause)
    trainer.wait_for(lambda: len(used(workdir)) >= pause)
    last_ones = workers(trainer.process)
    text = trainer.kill()
    assert text.count("worker processes are started again") == 1 and len(last_ones) == 2, text
    left, deadline = shared_memory() - before, time.monotonic() + PATIENCE
    while any(Path(f"/proc/{number}").exists() for number in last_ones) or (left := left & shared_memory()):
        assert time.monotonic() < deadline, (last_ones, left)
        time.sleep(0.02)
    run(workdir, scenes, workers=2)
    assert lines(workdir, "train/loss") == lines(undisturbed, "train/loss")
    assert_same_bits(restored(workdir, STEPS), restored(undisturbed, STEPS))
    assert dict(used(workdir)) == dict(used(undisturbed))


def test_one_device_and_eight_go_on_with_what_the_other_wrote(undisturbed, scenes, tmp_path, capsys):
    up, down = tmp_path / "up", tmp_path / "down"
    shutil.copytree(undisturbed, up)
    half = 3 * EVERY
    for step in Checkpoints(up / "checkpoints").steps():
        if step > half:
            shutil.rmtree(up / "checkpoints" / str(step))
    with pytest.raises(Killed):
        run(down, scenes, mesh=(2, 2, 2), end=half + 1)
    assert "from the start" in capsys.readouterr().err
    run(up, scenes, mesh=(2, 2, 2))
    assert f"going on after step {half}" in capsys.readouterr().err
    run(down, scenes)
    wanted = lines(undisturbed, "train/loss")
    for workdir in (up, down):
        np.testing.assert_allclose(lines(workdir, "train/loss"), wanted, rtol=1e-5)
