"""What a run asks of its process: compiled programs and memory that are kept, signals that are noticed."""

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmm import hosts
from jaxmm.hosts.clusters import has_tpu

log = logging.getLogger(__name__)

# glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Lets this process keep memory that it gave back, where JAX has nothing but the CPU and the C library is glibc.

    XLA on CPU takes its work space from malloc in every step. glibc would return it to the system each time and map
    it afresh, page fault by page fault, which took up to a third of a step. To be called before JAX starts its
    threads. Where there is an accelerator nothing would be gained, and threads that decode pictures would wait for
    each other.
    """
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if ((plugins or has_tpu()) and os.environ.get("JAX_PLATFORMS") != "cpu") or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
        mallopt(option, value)


class Termination:
    """Notices SIGTERM and Ctrl-C; a second one ends the process at once."""

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # signals reach the main thread only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, together: bool) -> bool:
        """Whether to stop now. Several hosts decide it where they all wait for each other anyway (`together`)."""
        if jax.process_count() == 1:
            return self.asked
        if not together:
            return False
        hosts.heartbeat("training", blocking=True)
        asked = bool(np.any(multihost_utils.process_allgather(np.asarray(self.asked))))
        hosts.heartbeat("training")
        return asked

    def _ask(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        print("stopping after this step, which is saved; once more to stop at once", file=sys.stderr)
