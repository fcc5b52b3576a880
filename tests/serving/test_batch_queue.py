"""Which requests are computed together, in which order, and what happens to those that fail or do not fit."""

import threading

import pytest

from jaxmm.serving.batch_queue import BatchQueue, QueueFull


class Gate:
    """Functions that record their batches; the first batch waits until the gate opens."""

    def __init__(self):
        self.batches, self.entered, self.opened = [], threading.Event(), threading.Event()

    def function(self, name):
        def compute(requests):
            self.batches.append((name, list(requests)))
            self.entered.set()
            assert self.opened.wait(60)
            return [(name, request) for request in requests]

        return compute


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def test_requests_that_wait_are_computed_together_the_oldest_first(gate):
    sizes = []
    queue = BatchQueue({name: gate.function(name) for name in "ab"}, batch=4, waiting=9, collect=0,
                       on_batch=lambda name, size, seconds: sizes.append((name, size, seconds >= 0)))
    answers = [queue.submit("a", 0)]
    assert gate.entered.wait(60)
    answers += [queue.submit(name, i) for i, name in enumerate("aabaaa", start=1)]
    gate.opened.set()
    assert [answer.result(60) for answer in answers] == [("a", 0), *(
        (name, i) for i, name in enumerate("aabaaa", start=1))]
    queue.close()
    assert gate.batches == [("a", [0]), ("a", [1, 2, 4, 5]), ("b", [3]), ("a", [6])]
    assert sizes == [("a", 1, True), ("a", 4, True), ("b", 1, True), ("a", 1, True)]


def test_a_request_waits_for_others_until_its_batch_is_full():
    """An hour, unless the batch is full or the queue is closed."""
    batches = []
    queue = BatchQueue({"a": lambda requests: batches.append(list(requests)) or requests}, batch=3, waiting=9,
                       collect=3600)
    answers = [queue.submit("a", i) for i in range(5)]
    assert [answer.result(60) for answer in answers[:3]] == [0, 1, 2]
    queue.close()
    assert [answer.result(0) for answer in answers] == [0, 1, 2, 3, 4] and batches == [[0, 1, 2], [3, 4]]
    with pytest.raises(RuntimeError, match="stopping"):
        queue.submit("a", 6)


@pytest.mark.parametrize("fail", [lambda i: 1 / 0, lambda i: None])
def test_only_the_request_that_fails_gets_the_error(fail):
    """An exception, or a wrong number of answers."""
    def compute(requests):
        if 2 in requests:
            fail(2)
            return []
        return [10 * request for request in requests]

    queue = BatchQueue({"a": compute}, batch=4, waiting=9, collect=3600)
    answers = [queue.submit("a", i) for i in range(4)]
    assert [answers[i].result(60) for i in (0, 1, 3)] == [0, 10, 30]
    with pytest.raises((ZeroDivisionError, ValueError)):
        answers[2].result(60)
    queue.close()


def test_a_cancelled_request_is_left_out(gate):
    queue = BatchQueue({"a": gate.function("a")}, batch=4, waiting=9, collect=0)
    queue.submit("a", 0)
    assert gate.entered.wait(60)
    gone, stays, alone = (queue.submit("a", i) for i in (1, 2, 3))
    assert gone.cancel() and alone.cancel()
    gate.opened.set()
    assert stays.result(60) == ("a", 2)
    queue.close()
    assert gate.batches == [("a", [0]), ("a", [2])]


def test_places_are_limited():
    queue = BatchQueue({"a": lambda requests: requests}, batch=4, waiting=2, collect=0)
    with queue.place(), queue.place():
        assert queue.waiting == 2
        with pytest.raises(QueueFull, match="2 requests are waiting, as many as may; try again in 1 s") as full:
            queue.place().__enter__()
        assert full.value.retry_after == 1
    assert queue.waiting == 0
    with queue.place():
        pass
    queue.close()
