"""What a task computes from the training images before the first step: once, and kept in the workdir."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.base import DataError
from jaxmm.data.images import decode
from jaxmm.data.transforms import eval_image
from jaxmm.evals.context import evenly_spaced
from jaxmm.inference.model import load
from jaxmm.planning.shapes import bind
from jaxmm.training.loop import train
from jaxmm.training.setup import _sample
from tests.chain import SIDE, Chain
from tests.evals.conftest import MemorySource
from tests.training.common import LINEAR, assert_same_bits, restored

CONFIG = replace(LINEAR, task=Chain(), steps=4, data=replace(
    LINEAR.data, image=ImageConfig(size=SIDE, train_crop="squash", eval_crop="squash", flip=False)))


def test_a_run_fits_once_and_resumes_with_what_it_fitted(tmp_path, monkeypatch):
    calls = []
    fit = Chain.fit
    monkeypatch.setattr(Chain, "fit", lambda task, images: calls.append(images(7)) or fit(task, images))
    train(CONFIG, tmp_path / "whole")
    train(replace(CONFIG, steps=2), tmp_path / "half")
    assert len(calls) == 2
    train(CONFIG, tmp_path / "half")
    assert len(calls) == 2
    assert_same_bits(restored(tmp_path / "half", 4), restored(tmp_path / "whole", 4))
    notes = json.loads((tmp_path / "half" / "config.json").read_text())
    assert notes["config"]["task"]["levels"] is None
    want = np.quantile(calls[0], np.linspace(0, 1, 5)).astype(int).tolist()
    assert notes["task"]["levels"] == want and load(tmp_path / "half").task.levels == tuple(want)


def test_the_images_are_evenly_spaced_as_in_evaluation():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (9, 11, 3), np.uint8) for _ in range(10)]
    source, config = MemorySource((*images[:9], b"broken")), ImageConfig(size=6)
    got = _sample(source, config, 4)
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    np.testing.assert_array_equal(got, np.stack([eval_image(decode(images[i]), config) for i in (0, 3, 6)]))
    with pytest.raises(DataError, match="none of the images asked for can be read"):
        _sample(MemorySource((b"broken",)), config, 4)


def test_a_plan_needs_no_images():
    config = replace(CONFIG, data=DataConfig(train="tfds:not_there:train", image=CONFIG.data.image))
    assert bind(config)[0].levels == (0,) * 5
