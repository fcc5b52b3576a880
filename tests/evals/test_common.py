from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

from jaxmm.config import DataConfig, Evaluator, TrainConfig
from jaxmm.evals import KNN, LinearProbe, Retrieval, TopKAccuracy, ZeroShot
from jaxmm.evals.accuracy import accuracy
from jaxmm.evals.context import concatenate, evenly_spaced
from jaxmm.evals.opened_sources import OpenedSources
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.task import Task
from jaxmm.training.setup import Setup
from jaxmm.training.state import State
from jaxmm.validation import ConfigError
from tests.evals.conftest import SIDE, LinearTask, MemorySource, numpy_outputs


def ragged(pictures, size):
    n = len(pictures)
    for start in range(0, n, size):
        part = list(pictures[start:start + size])
        mask = np.arange(size) < len(part)
        image = np.stack(part + [np.zeros_like(pictures[0])] * (size - len(part)))
        yield {"image": image, "mask": mask, "index": np.arange(start, start + size)}


def test_ragged_batches_are_exact_and_compile_once(mesh, params, pictures):
    images = pictures(19)
    task = LinearTask()
    task.traced.clear()
    predict_fn.cache_clear()
    size = padded_batch_size(6, mesh)
    assert size % (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    for _ in range(2):                                         # a second evaluation finds the compiled function
        fn = predict_fn(LinearTask(), ("features",), mesh)
        result, batch = concatenate(outputs(fn, params, ragged(images, size), mesh))
    assert task.traced == [(size, SIDE, SIDE, 3)]
    expected = np.stack(images).reshape(19, -1) / 255.0 @ params["image"]
    np.testing.assert_allclose(result["features"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch["index"], np.arange(19))


def test_batches_are_cut_over_the_data_axes_and_results_are_whole(params, pictures):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    seen = []

    def fn(params, batch):
        seen.append(batch["image"].sharding.shard_shape(batch["image"].shape))
        return predict_fn(LinearTask(), ("features",), mesh)(params, batch)

    list(outputs(fn, params, ragged(pictures(5), 8), mesh))
    assert seen == [(2, SIDE, SIDE, 3)]
    out = predict_fn(LinearTask(), ("features",), mesh)(params, {"image": np.zeros((8, SIDE, SIDE, 3), np.uint8)})
    assert out["features"].sharding.is_fully_replicated


@pytest.mark.parametrize("classes", ["abc", "abcdefg"])
def test_the_names_that_are_announced_are_those_that_come(classes, context, params, pictures):
    labels = tuple(np.arange(9) % len(classes))
    source = MemorySource(pictures(9), labels=labels, classes=tuple(classes), captions=[("a", "b c")] * 9)
    ctx = context(source, train=source, params=params | {"head": params["head"][:, :len(classes)]})
    for evaluator in (TopKAccuracy(), KNN(k=1), LinearProbe(), Retrieval(ks=(1, 3)), ZeroShot()):
        names = evaluator.metrics(ctx)
        assert names == tuple(name for name, _ in evaluator.run(ctx)) and len(names) > 0


def test_batch_size_is_rounded_up_to_the_devices(mesh):
    assert padded_batch_size(10, mesh) == {None: 10, (8, 1, 1): 16, (2, 2, 2): 12}[mesh and tuple(mesh.shape.values())]


def test_ties_and_nan_count_against_the_label():
    scores = np.array([[3, 1, 2], [1, 1, 0], [0, np.nan, 2], [np.nan] * 3, [np.inf, 0, 1]], float)
    labels = np.array([0, 1, 2, 0, 0])
    # ranks: first; second (tie); second (NaN may be above); none; none (infinite)
    assert accuracy(scores, labels, (1, 2, 3)) == {1: 1 / 5, 2: 3 / 5, 3: 3 / 5}


def test_evenly_spaced_numbers_cover_both_ends_without_repeats():
    assert evenly_spaced(100, 3).tolist() == [0, 49, 99]
    assert evenly_spaced(2, 12).tolist() == [0, 1]


def test_weights_chooses_the_average(context, params, pictures):
    source = MemorySource(pictures(6), labels=(0, 1, 2, 3, 4, 5), classes=tuple("abcdefg"))
    flipped = params | {"head": -params["head"]}
    mine, other = (dict(TopKAccuracy(weights=w).run(context(source, average=flipped))) for w in ("params", "average"))
    swapped = dict(TopKAccuracy().run(context(source, params=flipped)))
    assert other == swapped and other != mine


@pytest.mark.parametrize("evaluator, fields, words", [
    (TopKAccuracy(weights="average"), {}, "optimizer.average"),
    (TopKAccuracy(), {"val": None}, "data.val"),
    (TopKAccuracy(), {"val": MemorySource((np.zeros((2, 2, 3), np.uint8),))}, "needs labels"),
    (TopKAccuracy(), {"train": MemorySource((), classes=("cat", "dog"))}, "classes of data.train"),
    (ZeroShot(), {"tokenizer": None}, "tokenizer"),
    (ZeroShot(classes=("one",)), {}, "7 names"),
    (Retrieval(), {}, "have texts"),
    (KNN(), {}, "data.train"),
    (KNN(), {"train": MemorySource((), classes=("cat", "dog"))}, "classes of 'memory'"),
])
def test_impossible_evaluations_are_refused_before_anything_runs(evaluator, fields, words, context, pictures):
    source = MemorySource(pictures(3), labels=(0, 1, 2), classes=tuple("abcdefg"))
    with pytest.raises(ConfigError, match=words):
        evaluator.check(context(source, **fields))


def test_a_task_without_the_capability_is_told_what_it_has(context, pictures):
    class Other(LinearTask):
        classifier: ClassVar = None

    class Nothing(Task):
        pass

    source = MemorySource(pictures(3))
    with pytest.raises(ConfigError, match=r"^TopKAccuracy needs a task that classifies images or judges a text about "
                                          r"several images; Other embeds images, embeds texts$"):
        TopKAccuracy().check(context(source, task=Other()))
    with pytest.raises(ConfigError, match=r"^Retrieval needs a task that embeds images, embeds texts; Nothing offers "
                                          r"nothing$"):
        Retrieval().check(context(source, task=Nothing()))


@dataclass(frozen=True, kw_only=True)
class MeanScore(Evaluator):
    """Measures the mean largest logit: an evaluator outside jaxmm."""

    metric_names: ClassVar = ("largest", "count")
    needs: ClassVar = ("classifies images",)

    def measure(self, context, source):
        logits = context.predictions(self, ("logits",), context.batches(self, source))
        largest = np.concatenate([result["logits"].max(axis=1) for result, _ in logits])
        return largest.mean(), len(largest)


def test_an_evaluator_of_a_users_module_is_one_method(context, params, pictures):
    source = MemorySource(pictures(5))
    run = context(source, average={name: -value for name, value in params.items()})
    logits = numpy_outputs(params, source)[1]
    for weights, want in (("params", logits.max(axis=1).mean()), ("average", (-logits).max(axis=1).mean())):
        evaluator = MeanScore(weights=weights, batch_size=2, prefix="mine")
        metrics = dict(evaluator.run(run))
        assert tuple(metrics) == evaluator.metrics(run) == ("mine/largest", "mine/count")
        assert metrics == {"mine/largest": pytest.approx(want, rel=1e-5), "mine/count": 5}
    with pytest.raises(ConfigError, match="MeanScore needs a task that classifies images; Task offers nothing"):
        MeanScore().check(context(source, task=Task()))
    assert from_dict(to_dict(MeanScore(batch_size=3))) == MeanScore(batch_size=3)


@pytest.mark.parametrize("make", [
    lambda: Retrieval(pool=1), lambda: Retrieval(ks=()), lambda: KNN(k=0), lambda: ZeroShot(templates=("a photo",)),
    lambda: TopKAccuracy(batch_size=0)])
def test_fields_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_sources_of_evaluators_are_opened_and_grouped_once_per_run(monkeypatch, pictures):
    opened = []

    def open_source(spec, data_dir):
        opened.append((spec, data_dir))
        return MemorySource(pictures(2), captions=(("a",), ("b",)))

    monkeypatch.setattr("jaxmm.evals.opened_sources.open_source", open_source)
    config = TrainConfig(task=LinearTask(), data=DataConfig(data_dir="here"))
    first, second = (object.__new__(Setup) for _ in range(2))                        # of which most is not needed
    for run in (first, second):
        for name, value in (("config", config), ("workdir", Path()), ("task", config.task), ("train", None),
                            ("val", None), ("tokenizer", None), ("mesh", None), ("sources", OpenedSources())):
            object.__setattr__(run, name, value)
    state = State(step=0, params=None, opt=None, extra=None, average=None, skips=0)
    sources = [run.context(state).source_of(Retrieval(source="scenes:test")) for run in (first, first, second)]
    assert sources[0] is sources[1] is not sources[2] and opened == [("scenes:test", "here")] * 2
    views = [run.context(state).sources.by_image(sources[0]) for run in (first, first)]
    assert views[0] is views[1]
