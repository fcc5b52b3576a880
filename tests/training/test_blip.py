"""BLIP in the loop: one step for every model, queues and teacher in the checkpoint."""

from dataclasses import replace

import numpy as np
import pytest

from jaxmm.config import CheckpointConfig
from jaxmm.evals import Captions, Retrieval
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import load
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.training.loop import train
from jaxmm.training.setup import prepare
from jaxmm.validation import ConfigError
from tests.training.common import LINEAR, Killed, assert_same_bits, clip_run, lines, restored

pytestmark = pytest.mark.usefixtures("no_java")
STACK = {"depth": 2, "heads": 2, "dropout": 0.1}
VISION = ViTConfig(transformer=TransformerConfig(width=24, mlp_dim=40, **STACK), image_size=16, patch=4)
TEXT = MedConfig(transformer=TransformerConfig(width=16, mlp_dim=56, eps=1e-12, **STACK), context_width=24,
                 positions=24)
TASKS = {
    "pretraining": BLIPPretraining(model=BLIPConfig(vision=VISION, text=TEXT, embed_dim=20), queue=31, momentum=0.9,
                                   ramp=4),
    "captioning": Captioning(prompt="a", model=BLIPConfig(
        vision=VISION, text=replace(TEXT, encoder=False), embed_dim=None, matching=False, temperature=None))}


def test_a_queue_with_too_little_room_stops_the_run_before_it_begins(scenes, tmp_path):
    config = replace(clip_run(scenes, steps=6), task=replace(TASKS["pretraining"], queue=11), evals=())
    with pytest.raises(ConfigError, match=r"task\.queue is 11; expected at least data\.batch_size = 12"):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_captions_need_a_task_that_reads_them(scenes, tmp_path):
    for fields, message in (({"captions": 2}, r"data\.captions is 2; expected 1: Linear reads one text per image, or"),
                            ({"origins": (("web", 1.0),)}, r"data\.origins is .*; expected \(\): digits:train does")):
        with pytest.raises(ConfigError, match=message):
            prepare(replace(LINEAR, data=replace(LINEAR.data, **fields)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", TASKS)
def test_an_interrupted_run_goes_on_bit_for_bit(kind, scenes, tmp_path):
    evals = (Captions(decoding=Decoding(max_length=8), limit=12, batch_size=8, examples=2),)
    if kind == "pretraining":
        evals += (Retrieval(batch_size=16),)
    config = replace(clip_run(scenes, steps=6), task=TASKS[kind], evals=evals)
    config = replace(config, data=replace(config.data, val="scenes:tiny/val", captions=2))
    config = replace(config, checkpoint=CheckpointConfig(every=3))
    metrics = train(config, tmp_path / "whole")

    def end(step, batch):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "run", observe=end)
    assert train(config, tmp_path / "run") == metrics
    one, other = restored(tmp_path / "run", 6), restored(tmp_path / "whole", 6)
    assert_same_bits(one, other)
    assert 0 <= metrics["val/caption_exact"] <= 1 and metrics["val/caption_score"] < 0
    assert [step for step, _ in lines(tmp_path / "run", "train/loss")] == list(range(1, 7))
    if kind == "pretraining":
        assert int(one["extra"]["place"]) == 6 * 12 % 31 and int(one["extra"]["step"]) == 6
        teacher, student = (tree["vision"]["positions"] for tree in (one["extra"]["teacher"], one["params"]))
        assert np.abs(np.asarray(teacher) - np.asarray(student)).max() > 0
    model = load(tmp_path / "run")
    assert len(model.caption([np.zeros((20, 20, 3), np.uint8)], decoding=Decoding(max_length=8))[0]) == 1
    assert (tmp_path / "run" / "report.html").exists()
