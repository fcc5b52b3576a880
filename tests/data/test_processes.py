"""Workers give what this process would, and none outlives what started it."""

import multiprocessing
import multiprocessing.connection
import os
import signal

import pytest

from jaxmm.data.processes import in_order

PATIENCE = 60


def square(number):
    return number * number, os.getpid()


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_order():
    alone = [*in_order(square, range(9), 1)]
    both = [*in_order(square, range(9), 2)]
    assert [value for value, _ in both] == [value for value, _ in alone] == [n * n for n in range(9)]
    assert {process for _, process in alone} == {os.getpid()} and os.getpid() not in {process for _, process in both}


def test_a_killed_worker_is_told():
    with pytest.raises(OSError, match="a worker process was killed"):
        list(in_order(die, range(9), 2))


def test_ending_early_ends_the_workers():
    results = in_order(square, range(9), 2)
    next(results)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    results.close()
    assert not any(worker.is_alive() for worker in workers)


def tell_and_stay(pipe):
    """Starts workers, tells which, and stays until it is killed."""
    results = in_order(square, range(9), 2)
    next(results)
    pipe.send([worker.pid for worker in multiprocessing.active_children()])
    pipe.recv()


def test_workers_end_with_a_killed_process():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=tell_and_stay, args=(theirs,))
    process.start()
    workers = [os.pidfd_open(number) for number in ours.recv()]
    process.kill()
    process.join()
    assert len(workers) == 2
    ended = multiprocessing.connection.wait(workers[:1], PATIENCE) + multiprocessing.connection.wait(workers[1:],
                                                                                                     PATIENCE)
    assert ended == workers
