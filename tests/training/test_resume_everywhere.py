"""A run that is killed after every step ends as if undisturbed, and every array of its state matters for that."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxmm.checkpoints import Checkpoints
from jaxmm.config import CheckpointConfig, DataConfig, ImageConfig
from jaxmm.training.loop import train
from tests.training.common import (
    LINEAR,
    HeadBias,
    Killed,
    Plain,
    assert_every_array_matters,
    assert_same_run,
)

RECORDS = 24 + 2 * 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Epochs of two batches and a half, from two folders of which one counts twice; some of the images are broken."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("many", 24), ("few", 8)):
        for number in range(count):
            path = folder / part / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(path)
            if number in (5, 6):
                path.write_bytes(b"<html>")
    data = DataConfig(train=f"folder:{folder}/many + 2*folder:{folder}/few", val=f"folder:{folder}/few", batch_size=16,
                      max_bad=1.0, image=ImageConfig(size=8))
    return replace(LINEAR, task=Plain(), microbatches=2, data=data, eval_every=4, evals=(HeadBias(),),
                   checkpoint=CheckpointConfig(every=1, keep=2, best="val/bias"))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(config, workdir)
    return workdir


def test_killed_after_every_step_it_ends_as_if_undisturbed(config, undisturbed, tmp_path):
    """Epochs end within and between batches; there are microbatches, evaluations and records that are replaced."""
    used = {}
    for end in (*range(2, config.steps + 1), None):
        def observe(step, batch, end=end):
            if step == end:
                raise Killed
            records = batch["drawn"].tolist(), batch["index"].tolist()
            assert used.setdefault(step, records) == records

        if end is None:
            train(config, tmp_path, observe=observe)
        else:
            with pytest.raises(Killed):
                train(config, tmp_path, observe=observe)
    assert_same_run(tmp_path, undisturbed)
    one, other = (Checkpoints(workdir / "checkpoints").steps() for workdir in (tmp_path, undisturbed))
    assert one == other
    drawn = np.concatenate([used[step][0] for step in range(1, config.steps + 1)])
    for epoch in np.split(drawn[:4 * RECORDS], 4):
        assert sorted(epoch) == list(range(RECORDS))
    assert any(drawn != index for drawn, index in used.values())           # broken ones are replaced


def test_every_array_of_a_checkpoint_matters(tmp_path):
    """Parameters, average, moments and counts of the optimizer, the task's own state, the step."""
    train(replace(LINEAR, steps=4), tmp_path)
    assert assert_every_array_matters(LINEAR, tmp_path) == 16


def test_clocks_time_zones_and_the_order_of_folders_change_nothing(config, undisturbed, tmp_path, monkeypatch):
    """The clock goes back: if it leaps forward during a save, Orbax gives that save up, as if it took so long.

    Processes of other tests have other seeds of `hash`.
    """
    clock, scandir, listdir = time.time, os.scandir, os.listdir

    class Reversed:
        def __init__(self, *args):
            with scandir(*args) as entries:
                self._entries = iter(list(entries)[::-1])

        def __iter__(self):
            return self._entries

        def __next__(self):
            return next(self._entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        close = __exit__

    wrong = [-1e7]
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + wrong[-1])
        patch.setattr(os, "scandir", Reversed)
        patch.setattr(os, "listdir", lambda *args: listdir(*args)[::-1])
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        train(config, tmp_path, observe=lambda step, _: wrong.append(wrong[-1] - 3600))
    time.tzset()
    assert_same_run(tmp_path, undisturbed)
