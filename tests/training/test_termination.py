"""A request to stop, whenever it comes: the last step is saved, and the run goes on exactly."""

import os
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest

from jaxmm.checkpoints import Checkpoints
from jaxmm.config import CheckpointConfig
from jaxmm.data.pipeline import TrainIterator
from jaxmm.training import loop
from jaxmm.training.loop import train
from tests.training.common import LINEAR, HeadBias, Killed, assert_same_run

CONFIG = replace(LINEAR, steps=8, eval_every=3, evals=(HeadBias(),), data=replace(LINEAR.data, val="digits:test"),
                 checkpoint=CheckpointConfig(every=4, keep=9))
PATIENCE = 60
"""Seconds until what nothing interrupts counts as hanging."""


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def ask_and_hang():
    ask()
    threading.Event().wait(PATIENCE)
    raise AssertionError("it was not interrupted")


def once():
    """Yield `ask`, then what does nothing."""
    yield ask
    while True:
        yield lambda: None


def in_compilation(patch):
    compile_step = loop.compile_step

    def compiled(*args, **options):
        step, requests = compile_step(*args, **options), once()
        return lambda *inputs: (next(requests)(), step(*inputs))[1]

    patch.setattr(loop, "compile_step", compiled)


def in_data_wait(patch):
    read = TrainIterator.__next__
    patch.setattr(TrainIterator, "__next__",
                  lambda self: ask_and_hang() if self.get_state()["step"] == 6 else read(self))


def in_evaluation(patch, number):
    run, numbers = HeadBias.run, iter(range(1, 9))

    def measure(self, context):
        if next(numbers) == number:
            ask_and_hang()
        yield from run(self, context)

    patch.setattr(HeadBias, "run", measure)


def in_save(patch):
    """Ask in the thread that finishes a save."""
    finish, requests = Checkpoints._finish, once()
    patch.setattr(Checkpoints, "_finish", lambda self, *args: (next(requests)(), finish(self, *args)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(CONFIG, workdir)
    return workdir


def test_whenever_it_is_asked_it_saves_and_the_run_goes_on_exactly(undisturbed, tmp_path, monkeypatch, capsys):
    """While the step compiles, while an evaluation or the data hang, during a save, and in the last evaluation."""
    for when, last in ((in_compilation, 1), (partial(in_evaluation, number=1), 3), (in_save, None), (in_data_wait, 6),
                       (partial(in_evaluation, number=2), 8)):
        with monkeypatch.context() as patch:
            when(patch)
            assert train(CONFIG, tmp_path) == {}
        *_, saved = Checkpoints(tmp_path / "checkpoints").steps()
        assert f"stopped after step {saved} as asked, everything is saved" in capsys.readouterr().err
        assert saved == last or (last is None and saved in (4, 5))
    train(CONFIG, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_before_the_first_batch_there_is_nothing_to_save(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", lambda self: ask_and_hang())
        assert train(CONFIG, tmp_path) == {}
    assert "stopped after step 0 as asked" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def test_ended_during_the_save_it_has_named_the_checkpoint_before(undisturbed, tmp_path, monkeypatch, capsys):
    """The second request ends it, like a kill if the time to stop is shorter than a save."""
    save = Checkpoints.save

    def slow(self, state, data):
        if len(self.steps()):
            ask()
        save(self, state, data)
        self.wait()

    def end(status):
        raise Killed(status)

    with monkeypatch.context() as patch, pytest.raises(Killed) as ended:
        patch.setattr(Checkpoints, "save", slow)
        patch.setattr(os, "_exit", end)
        train(CONFIG, tmp_path, observe=lambda step, batch: ask() if step == 6 else None)
    assert ended.value.args == (128 + signal.SIGTERM,)
    assert "saving step 6, as asked to stop; the last whole checkpoint is of step 4" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]
    train(CONFIG, tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_killed_in_an_evaluation_the_run_does_it_when_it_goes_on(undisturbed, tmp_path, monkeypatch):
    config = replace(CONFIG, checkpoint=CheckpointConfig(every=3, keep=9))

    def killed(self, context):
        raise Killed
        yield

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(HeadBias, "run", killed)
        train(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]
    train(config, tmp_path)
    assert_same_run(tmp_path, undisturbed)
