"""A run in a process of its own, to be killed: `python -m tests.training.process WORKDIR DATA_DIR [options]`.

A line of WORKDIR/ledger.jsonl a step says which records it used. `--pause N` stops before the end of step N until a
signal comes. `--hold PHASE` never finishes its first save: held while Orbax writes, or while the digests are taken,
which the file WORKDIR/held tells.
"""

import argparse
import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax

from jaxmm import checkpoints as checkpoint
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import CheckpointConfig, MeshConfig
from jaxmm.training.loop import train
from tests.training.common import clip_run

STEPS, EVERY = 28, 4


def config(data_dir, *, steps=STEPS, mesh=(1, 1, 1)):
    """Two epochs of 160 records and a bit."""
    return clip_run(data_dir, steps=steps, mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
                    checkpoint=CheckpointConfig(every=EVERY, keep=9))


def hold(phase: str, workdir: Path) -> None:
    """Makes saves stop where `phase` says."""
    def stop(*_):
        (workdir / "held").touch()
        threading.Event().wait()

    if phase == "writing":
        checkpoint.Checkpoints._finish = stop
    else:
        checkpoint.digests = stop


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("data_dir")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pause", type=int)
    parser.add_argument("--hold", choices=("writing", "digests"))
    options = parser.parse_args()
    use_compilation_cache(options.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    options.workdir.mkdir(exist_ok=True)
    if options.hold:
        hold(options.hold, options.workdir)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    with (options.workdir / "ledger.jsonl").open("a") as ledger:
        def observe(step, batch):
            ledger.write(json.dumps({"step": step, "records": batch["index"].tolist()}) + "\n")
            ledger.flush()
            if step == options.pause:
                os.read(reader, 1)

        run = config(options.data_dir, steps=options.steps, mesh=options.mesh)
        train(replace(run, data=replace(run.data, data_dir=options.data_dir)), options.workdir, observe=observe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
