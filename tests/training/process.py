"""A run in a process of its own, to be killed: `python -m tests.training.process WORKDIR DATA_DIR [options]`.

A line of WORKDIR/ledger.jsonl a step says which records it used. `--pause N` stops before the end of step N until a
signal comes. `--workers N` reads with that many processes, one of which `--kill-worker K` kills after step K.
`--block` never finishes its first save, which the file WORKDIR/blocked tells.
"""

import argparse
import json
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

from jaxmm import checkpoints
from jaxmm.config import CheckpointConfig, MeshConfig
from jaxmm.paths import user_path
from jaxmm.training.loop import train
from tests.training.common import Killed, clip_run

STEPS, EVERY = 28, 4


def config(data_dir, *, steps=STEPS, mesh=(1, 1, 1), workers=0):
    """Two epochs of 160 records and a bit."""
    run = clip_run(data_dir, steps=steps, mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
                   checkpoint=CheckpointConfig(every=EVERY, keep=9))
    return replace(run, data=replace(run.data, workers=workers))


def run(workdir, data_dir, pause=None, end=None, ledger=None, kill_worker=None, **options):
    """Train in `workdir`, with a ledger of the records that each step used; raise `Killed` before step `end` is."""
    workdir.mkdir(exist_ok=True)
    with ((ledger or workdir) / "ledger.jsonl").open("a") as ledger:
        def observe(step, batch):
            if step == end:
                raise Killed
            ledger.write(json.dumps({"step": step, "records": batch["index"].tolist()}) + "\n")
            ledger.flush()
            if step == kill_worker:
                multiprocessing.active_children()[0].kill()
            if step == pause:
                threading.Event().wait()

        return train(config(str(data_dir), **options), workdir, observe=observe)


def block(workdir: Path) -> None:
    """Make the first save wait for ever while Orbax writes."""
    def stop(*_):
        (workdir / "blocked").touch()
        threading.Event().wait()

    checkpoints.Checkpoints._finish = stop


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=user_path)
    parser.add_argument("data_dir")
    parser.add_argument("--pause", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--kill-worker", type=int)
    parser.add_argument("--block", action="store_true")
    parser.add_argument("--ledger", type=Path)
    options = parser.parse_args()
    if options.block:
        block(options.workdir)
    run(options.workdir, options.data_dir, options.pause, ledger=options.ledger, workers=options.workers,
        kill_worker=options.kill_worker)


if __name__ == "__main__":
    main()
