"""Set up the process of a run: memory that is kept, signals that are noticed."""

import contextlib
import ctypes
import importlib.metadata
import itertools
import os
import platform
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jaxmm.hosts.clusters import has_tpu

# glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Let this process keep memory that it gave back, if JAX has only the CPU and the C library is glibc.

    XLA on CPU takes its work space from malloc in every step. glibc would return it to the system each time and map
    it again, page fault by page fault, which took up to a third of a step. To be called before JAX starts its threads.
    With an accelerator there is nothing to gain, and threads that decode images would wait for each other.
    """
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if ((plugins or has_tpu()) and os.environ.get("JAX_PLATFORMS") != "cpu") or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
        mallopt(option, value)


_calls = itertools.count()
"""Steps of all runs of this process: a number that is the same on all hosts and never falls."""


class Interrupted(BaseException):
    """A request to stop ended what was `Termination.interruptible`; no handler of errors sees it."""


class Termination:
    """Notice SIGTERM and Ctrl-C; a second one ends the process at once.

    On several hosts SIGTERM is left to JAX, which has the hosts agree on a step after which all of them stop.
    """

    def __init__(self):
        self.asked = False
        self._before = {}
        self._interruptible = False

    def __enter__(self):
        handlers = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask}
        if jax.process_count() > 1:  # the supervisor of each host ends it at the second signal
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        with contextlib.suppress(ValueError):  # signals reach the main thread only
            for number, handler in handlers.items():
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self) -> bool:
        """Return whether to stop after this step; to be called once after each step, on all hosts."""
        number = next(_calls)
        return self.asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` in what is done inside when asked to stop: it may take longer than the time to stop.

        On several hosts nothing is interrupted, since all of them have to stop after the same step.
        """
        self._interruptible = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _ask(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        print("stopping after this step, which is saved; once more to stop at once", file=sys.stderr)
        if self._interruptible:
            raise Interrupted
