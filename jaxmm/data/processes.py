"""Run worker processes that end with the process that started them, and return their results in order."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def start_worker(worker: int, workers: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers, and end this process when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()


def in_order(run: Callable[[Any], Any], inputs: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield `run(input)` of each input, in order, from `workers` spawned processes, or from this one if 1 is enough.

    `run`, which each worker gets once, and the inputs must pickle. An early end, such as Ctrl-C, ends the workers at
    once. Raises `OSError` if one is killed.
    """
    workers = min(workers, len(inputs))
    if workers <= 1:
        with warnings.catch_warnings():
            _ignore_warnings()
            yield from map(run, inputs)
        return
    others = set(multiprocessing.active_children())
    waiting = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (run,)) as pool:
        try:
            for value in inputs:
                waiting.append(pool.submit(_run, value))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError("a worker process was killed, perhaps for want of memory; fewer workers need less") from None
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


_running: list[Callable[[Any], Any]] = []  # the function of a worker, which may contain a source


def _run(value: Any) -> Any:
    return _running[0](value)


def _start(run: Callable[[Any], Any]) -> None:
    start_worker(0, 0)
    _ignore_warnings()
    _running.append(run)


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about images that it repairs; it raises for others


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()  # by its pipe, which also works if it ended before
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
