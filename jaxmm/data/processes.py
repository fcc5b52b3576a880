"""Worker processes that end with the process that started them, and their results in order."""

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
    """Leaves Ctrl-C to the main process, which ends its workers, and ends with it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()


def in_order(run: Callable[[Any], Any], inputs: Sequence[Any], workers: int) -> Iterator[Any]:
    """`run` of each input, in their order, by that many processes (spawned), or by this one where one is enough.

    `run`, which each worker gets once, and the inputs must pickle. Whatever ends this early, such as Ctrl-C, ends the
    workers at once. Raises `OSError` where one is killed.
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
            for given in inputs:
                waiting.append(pool.submit(_run, given))
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


_running: list[Callable[[Any], Any]] = []  # in a worker: what it runs, which may hold all of a source


def _run(given: Any) -> Any:
    return _running[0](given)


def _start(run: Callable[[Any], Any]) -> None:
    start_worker(0, 0)
    _ignore_warnings()
    _running.append(run)


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on what it repairs in pictures; what it cannot raises


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()  # by its pipe, which tells also that it ended before this began
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
