"""The commands with everything in a bucket: killed at random, as one process and as two, they end as local ones do."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmm.paths import user_path
from tests.bucket_servers import free_port
from tests.training.common import lines

ROOT = Path(__file__).parents[2]
DIGITS = ("--config", "configs/vit_digits.py", "--steps", "60", "--checkpoint.every", "5", "--log-every", "1")
SCENES = ("--steps", "40", "--checkpoint.every", "10", "--log-every", "1")
"""The default job, cut short."""


def start(workdir, options, hosts, output):
    """Start the command on `hosts` hosts of one device."""
    address, started = f"localhost:{free_port()}", []
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for index in range(hosts):
        several = ("--hosts.address", address, "--hosts.count", hosts, "--hosts.index", index) if hosts > 1 else ()
        with (output / f"output-{index}.txt").open("a") as file:
            started.append(subprocess.Popen([sys.executable, "run_train.py", "--workdir", workdir, *options,
                                             *map(str, several)], cwd=ROOT, env=environment, stdout=file, stderr=file))
    return started


def wait(processes):
    return [process.wait(3000) for process in processes]


@pytest.mark.long
@pytest.mark.parametrize("options, hosts, kills", [(DIGITS, 1, 4), (DIGITS, 2, 2), (SCENES, 1, 2)])
def test_killed_at_random_a_command_ends_as_if_undisturbed(options, hosts, kills, gcs, tmp_path, record_property):
    """One host is killed some time after its run has begun; the others end by themselves, and all start again."""
    assert wait(start(str(tmp_path / "local"), options, hosts, tmp_path)) == [0] * hosts
    rng, since = random.Random(hosts), time.monotonic()
    for number in range(kills):
        begun = (tmp_path / "output-0.txt").read_text().count("training records")
        running = start(gcs, options, hosts, tmp_path)
        while (tmp_path / "output-0.txt").read_text().count("training records") == begun and running[0].poll() is None:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 20))
        running[rng.randrange(hosts)].kill()
        statuses = wait(running)
        record_property(f"{hosts} hosts, kill {number}", statuses)
    assert wait(start(gcs, options, hosts, tmp_path)) == [0] * hosts, (tmp_path / "output-0.txt").read_text()
    record_property("seconds", time.monotonic() - since)
    near, far = (lines(path, "train/loss") for path in (tmp_path / "local", user_path(gcs)))
    assert far == near and len(near) == int(options[options.index("--steps") + 1])
    assert json.loads((user_path(gcs) / "config.json").read_text())["hosts"] == hosts
