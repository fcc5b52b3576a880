"""A task, a source and an evaluator that no file of jaxmm knows work like built-in ones."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import jaxmm
from jaxmm.data.sources import registry
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.context import EvalContext
from jaxmm.pretrained.io.files import FileError
from jaxmm.recipes import load_recipe
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.training.loop import train
from jaxmm.validation import ConfigError
from tests.training.common import LINEAR, assert_same_bits, lines

CODE = '''
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data import Source, register_source
from jaxmm.data.base import fingerprint
from jaxmm.task import Classifier, Task
from tests.training.common import LINEAR


@dataclass(frozen=True, kw_only=True)
class Brightness(Task):
    """Regression of the label on the mean of each channel."""

    gain: float = 1.0
    reads: ClassVar = ("image", "label")

    def bind(self, *, image_size, classes, tokenizer):
        return self

    def init(self, rng):
        return {"kernel": jax.random.normal(rng, (3,))}

    def encode(self, params, batch, rng):
        return self.gain * batch["image"].mean((1, 2)) / 255 @ params["kernel"]

    def objective(self, params, outputs, batch):
        return jnp.square(outputs - batch["label"]).mean(), {}

    @property
    def classifier(self):
        return Classifier(logits=lambda params, batch: self.encode(params, batch, None))


@dataclass(frozen=True, kw_only=True)
class MeanBrightness(Evaluator):
    """Yields the mean prediction of all records."""

    offset: float = 0.0

    def metrics(self, context):
        return (f"{self.prefix}/brightness",)

    def run(self, context):
        images = np.stack([context.val[i]["image"] for i in range(len(context.val))])
        found = context.task.classifier.logits(context.params, {"image": images})
        yield self.metrics(context)[0], float(found.mean()) + self.offset


@dataclass(frozen=True)
class Grey(Source):
    """Images of one grey each, whose label is 1 if they are bright."""

    name: str
    count: int
    classes: tuple[str, ...] = ("dark", "bright")

    @property
    def fingerprint(self):
        return fingerprint([self.name])

    def __len__(self):
        return self.count

    def __bool__(self):
        return True

    def __getitem__(self, index):
        grey = 37 * index % 256
        return {"key": str(index), "image": np.full((9, 9, 3), grey, np.uint8), "label": int(grey > 127)}


register_source("grey", lambda spec, location, data_dir: Grey(spec, int(location)), "COUNT")


def get_config():
    return replace(LINEAR, task=Brightness(gain=2.0), steps=2, evals=(MeanBrightness(offset=10.0),), data=replace(
        LINEAR.data, train="grey:40", val="grey:7"))
'''


def run_module(name: str) -> ModuleType:
    """Define everything again in the module `name`, as a cell of a notebook does in `__main__`."""
    module = sys.modules.get(name) or ModuleType(name)
    sys.modules[name] = module
    exec(CODE, module.__dict__)
    return module


@pytest.mark.parametrize("where, advice", [
    ("own_module", "the module own_module is not imported; import own_module first"),
    ("recipe_own", r"load that recipe first: jaxmm\.recipes\.load_recipe\(Path\(.*/own\.py"),
    ("__main__", "at the top level of its module; run what defines it first")])
def test_it_trains_resumes_loads_and_evaluates(where, advice, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", {})
    name = "own_module" if where == "own_module" else "own"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    def define():
        if where == "recipe_own":
            return load_recipe(Path(tmp_path / "own.py"))
        return (run_module(where) if where == "__main__" else importlib.import_module(where)).get_config()

    def forget():
        for attribute in ("Brightness", "MeanBrightness", "Grey"):
            vars(sys.modules[where]).pop(attribute, None)
        if where != "__main__":
            del sys.modules[where]

    config = define()
    try:
        straight = train(replace(config, steps=4), tmp_path / "straight")
        train(config, tmp_path / "run")
        forget()
        with pytest.raises(FileError, match=rf"{tmp_path}/run/config\.json: type is '{where}\.Brightness'.*{advice}"):
            jaxmm.load(tmp_path / "run")
        assert where == "__main__" or where not in sys.modules               # a file's word imports nothing

        config = define()
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
        assert train(replace(config, steps=4), tmp_path / "run") == straight
        assert lines(tmp_path / "run", "val/brightness")[-1] == (4, straight["val/brightness"])
        models = [jaxmm.load(tmp_path / folder) for folder in ("straight", "run")]
        assert_same_bits(models[0].params, models[1].params)
        assert models[1].task == config.task

        (evaluator,) = config.evals
        context = EvalContext(task=models[1].task, params=models[1].params, data=config.data, val=open_source("grey:7"))
        (value,) = dict(evaluator.run(context)).values()
        greys = np.array([37 * i % 256 for i in range(7)])
        expected = 10 + 2 * greys.mean() / 255 * float(models[1].params["kernel"].sum())
        assert value == pytest.approx(expected, rel=1e-5)
    finally:
        if where in sys.modules:
            forget()


def test_only_frozen_dataclasses_are_built(monkeypatch):
    module = ModuleType("own_module")
    exec("from dataclasses import dataclass\n@dataclass\nclass Open:\n    a: int = 0\nvalue = 3", module.__dict__)
    monkeypatch.setitem(sys.modules, "own_module", module)
    for name in ("Open", "value", "dataclass"):
        with pytest.raises(ConfigError, match=rf"type is 'own_module\.{name}'; expected a frozen dataclass"):
            from_dict({"type": f"own_module.{name}"})


def test_a_configuration_of_an_older_version_is_read():
    """Types as 836e5f2 wrote them."""
    old = to_dict(LINEAR) | {"task": {"type": "jaxmm.tasks.classify.Classify", "mixup": 0.4, "model": to_dict(
        tiny_vit())}, "evals": [{"type": "jaxmm.evals.classification.Classification", "examples": 3}]}
    config = from_dict(json.loads(json.dumps(old)))
    assert (type(config.task).__module__, config.task.mixup) == ("jaxmm.tasks.image_classification", 0.4)
    assert config.task.model == tiny_vit() and config.evals[0].examples == 3


def tiny_vit():
    from jaxmm.models.vit import vit
    return vit("mu/4", image_size=8)
