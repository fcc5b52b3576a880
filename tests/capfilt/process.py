"""A run of its own: `python -m tests.capfilt.process OUT DATA MODELS`; killed at the n-th fsync, or one of several."""

import os
import signal
import sys
from pathlib import Path

from jaxmm.hosts.startup import HostsConfig, distributed
from tests.capfilt.conftest import run

if __name__ == "__main__":
    hosts = HostsConfig()
    if "HOSTS" in os.environ:
        hosts = HostsConfig(address=os.environ["ADDRESS"], count=int(os.environ["HOSTS"]),
                            index=int(os.environ["HOST"]))
    if "KILLED_AT" in os.environ:
        left, fsync = int(os.environ["KILLED_AT"]), os.fsync

        def counted(file):
            global left
            fsync(file)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = counted
    with distributed(hosts, sys.argv[1]):
        run(*map(Path, sys.argv[1:4]))
