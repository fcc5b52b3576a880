"""A long life of one process: memory, descriptors and threads stay as they are, and nothing is compiled again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.common import lines
from tests.training.soak import SAMPLES

ROOT = Path(__file__).parents[2]
COUNTS = {"steps": 20_000, "calls": 2_000}
"""Steps of training; captions and searches."""
ALLOWED = {"steps": 6, "calls": 2}
"""MiB by which memory may grow in the later half."""


@pytest.mark.long
@pytest.mark.parametrize("kind", COUNTS)
def test_a_long_life_of_a_process(kind, tmp_path, record_property):
    command = [sys.executable, "-m", "tests.training.soak", kind, str(COUNTS[kind]), tmp_path]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    samples = np.array([json.loads(line) for line in output.splitlines()])
    assert len(samples) == SAMPLES
    assert kind == "calls" or len(lines(tmp_path, "val/bias")) == SAMPLES
    memory, files, threads, compiled = samples[SAMPLES // 2:].T
    growth = (memory[-1] - memory[0]) / 2**20
    for name, figure in {"MiB more in the later half": f"{growth:.2f}", "descriptors": np.unique(files),
                         "threads": np.unique(threads)}.items():
        record_property(f"{COUNTS[kind]:,} {kind}: {name}", str(figure))
    assert growth < ALLOWED[kind], memory
    assert np.ptp(files) <= 4 and files[-1] <= files[0] + 2, files         # a save may be under way
    assert np.ptp(threads) <= 4 and threads[-1] <= threads[0] + 2, threads
    assert samples[0, 3] > 0 and not compiled.any(), samples[:, 3]
