"""Worker processes that end with the process that started them, and their results in order."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def start_worker(worker: int, workers: int) -> None:
    """Leaves Ctrl-C to the main process, which ends its workers, and ends with it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()


def in_order(run: Callable[[Any], Any], inputs: Sequence[Any], workers: int) -> Iterator[Any]:
    """`run` of each input, in their order, by that many processes (spawned), or by this one where one is enough.

    `run`, which each worker gets once, and the inputs must pickle. Ctrl-C ends the workers at once. Raises `OSError`
    where one is killed.
    """
    workers = min(workers, len(inputs))
    if workers <= 1:
        with warnings.catch_warnings():
            _ignore_warnings()
            yield from map(run, inputs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_short_lived, (run,)) as pool:
        try:
            yield from pool.map(_run, inputs)
        except BrokenProcessPool:
            raise OSError("a worker process was killed, perhaps for want of memory; fewer workers need less") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_running: list[Callable[[Any], Any]] = []  # in a worker: what it runs, which may hold all of a source


def _run(given: Any) -> Any:
    return _running[0](given)


def _start_short_lived(run: Callable[[Any], Any]) -> None:
    _running.append(run)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    _ignore_warnings()
    _end_with_parent()


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on what it repairs in pictures; what it cannot raises


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
