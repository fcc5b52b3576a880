"""A run of its own: `python -m tests.capfilt.process OUT DATA MODELS`; killed at the n-th fsync, or one of several."""

import os
import signal
import sys
from pathlib import Path

import jax

from tests.capfilt.conftest import run

if __name__ == "__main__":
    if "HOSTS" in os.environ:
        jax.distributed.initialize(os.environ["ADDRESS"], int(os.environ["HOSTS"]), int(os.environ["HOST"]))
    if "KILLED_AT" in os.environ:
        left, fsync = int(os.environ["KILLED_AT"]), os.fsync

        def counted(file):
            global left
            fsync(file)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = counted
    run(*map(Path, sys.argv[1:4]))
