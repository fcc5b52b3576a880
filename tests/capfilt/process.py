"""A run of its own: `python -m tests.capfilt.process OUT DATA MODELS`; one of several, or killed at the n-th fsync, or
the n-th upload if OUT is in a bucket."""

import os
import signal
import sys

from jaxmm.hosts.startup import HostsConfig, distributed
from jaxmm.paths import is_bucket, user_path
from tests.capfilt.conftest import run

if __name__ == "__main__":
    hosts = HostsConfig()
    if "HOSTS" in os.environ:
        hosts = HostsConfig(address=os.environ["ADDRESS"], count=int(os.environ["HOSTS"]),
                            index=int(os.environ["HOST"]))
    folders = [user_path(folder) for folder in sys.argv[1:4]]
    if "KILLED_AT" in os.environ:
        left = int(os.environ["KILLED_AT"])
        owner, name = (type(folders[0]), "upload") if is_bucket(folders[0]) else (os, "fsync")
        plain = getattr(owner, name)

        def counted(*args):
            global left
            plain(*args)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        setattr(owner, name, counted)
    with distributed(hosts, sys.argv[1]):
        run(*folders)
