import sys

import pytest

from benchmarks.common import Rounds, Worker
from benchmarks.sides import Case

SLEEPER = """
from benchmarks.common import serve
import itertools
paces = itertools.chain({paces}, itertools.repeat(1.0))
serve({{"check": [{value}]}}, {{"run": lambda: {{"s": {value}}}, "pace": lambda: {{"s": next(paces)}}}})
"""


def worker(value, paces=()):
    return Worker([sys.executable, "-c", SLEEPER.format(value=value, paces=list(paces))])


def test_rounds_on_a_slow_machine_do_not_count():
    """The pace runs before the first round and after each: the second ends slow here, so the third starts slow."""
    workers = {"ours": worker(2.0, [1.0, 1.02, 1.5, 1.01, 1.0]), "theirs": worker(3.0)}
    rounds = Rounds(workers, workers["ours"], tolerance=0.05)
    rounds.measure(2, most=10)
    assert [pace for pace, _ in rounds.rounds] == [1.02, 1.5, 1.5, 1.01]
    assert len(rounds.kept()) == 2
    assert rounds.median("ours") == 2.0 and rounds.median("theirs") == 3.0
    for w in workers.values():
        w.close()


def test_a_worker_that_dies_says_why():
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        Worker([sys.executable, "-c", "1 / 0"])


def test_flop():
    """ViT-B/16 is known for 17.58 billion multiply-adds a picture."""
    case = Case("", "vit:B/16", False, 2, "float32", "none")
    assert case.flop == pytest.approx(2 * 2 * 17.58e9, rel=1e-3)
    train = Case("", "clip:ViT-B-32", True, 1, "float32", "none")
    assert train.flop == pytest.approx(3 * 14.78e9, rel=0.01)  # open_clip's model profile
