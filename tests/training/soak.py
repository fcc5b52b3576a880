"""A long life of one process without the tests' checks of annotations: `python -m tests.training.soak KIND COUNT DIR`.

It prints a line of JSON per sample: resident bytes, open descriptors, threads, and programs compiled since the last.
"""

import argparse
import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import jax

from jaxmm.config import CheckpointConfig
from jaxmm.inference.generate import Decoding
from jaxmm.inference.search import build_index, open_index
from jaxmm.training.loop import train
from tests.pretrained import tiny
from tests.training.common import LINEAR, HeadBias

SAMPLES = 40
PAGE = os.sysconf("SC_PAGE_SIZE")
compiled: list[str] = []


def sample():
    """Print what this process uses."""
    gc.collect()
    print(json.dumps([int(Path("/proc/self/statm").read_text().split()[1]) * PAGE, len(os.listdir("/proc/self/fd")),
                      len(os.listdir("/proc/self/task")), len(compiled)]), flush=True)
    compiled.clear()


def steps(count, folder):
    """Train, with an evaluation and a save between two samples."""
    every = count // SAMPLES
    config = replace(LINEAR, steps=count, log_every=100, eval_every=every, evals=(HeadBias(),),
                     data=replace(LINEAR.data, val="digits:test"), checkpoint=CheckpointConfig(every=every, keep=2))
    train(config, folder, observe=lambda step, _: sample() if step % every == every - 1 else None)


def calls(count, folder):
    """Caption and search, with the same results whenever the inputs are the same."""
    captioner, towers, images = tiny.captioner(), tiny.clip(), tiny.pictures(7)
    build_index(lambda paths, on_error: towers.encode_image(images), "tiny", [str(n) for n in range(7)],
                folder / "index", on_error=lambda *_: None)
    decoding, first = Decoding(beams=3, max_length=9), {}
    for number in range(count):
        [caption] = captioner.caption([images[number % 7]], decoding=decoding)
        [query] = towers.encode_text([f"text {number % 5}"])
        result = caption, [found.path for found in open_index(folder / "index").search(query, 3)]
        assert first.setdefault(number % 35, result) == result
        if (number + 1) % (count // SAMPLES) == 0:
            sample()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("steps", "calls"))
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None)
    {"steps": steps, "calls": calls}[options.kind](options.count, options.folder)
