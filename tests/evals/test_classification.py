import numpy as np
import pytest

from jaxmm.evals import PredictionExample, TopKAccuracy
from tests.evals.conftest import CLASSES, MemorySource, numpy_outputs


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True, ids=str)
def test_against_numpy_over_devices_with_a_broken_image(mesh, context, params, pictures):
    images, labels = list(pictures(21)), tuple(np.random.default_rng(3).integers(0, CLASSES, 21).tolist())
    images[4] = b"not a picture"
    source = MemorySource(tuple(images), labels=labels, classes=tuple("abcdefg"))
    ctx = context(source, mesh)
    got = dict(TopKAccuracy(batch_size=8, examples=5).run(ctx))

    _, logits, _ = numpy_outputs(params, source)
    logits, y = logits.astype(np.float64), np.delete(labels, 4)
    order = np.argsort(-logits, axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = {"val/top1": np.mean(order[:, 0] == y), "val/top5": np.mean((order[:, :5] == y[:, None]).any(axis=1)),
            "val/loss": -np.log(p[np.arange(20), y]).mean()}
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)

    assert len(ctx.examples) == 5
    first = ctx.examples[0]
    assert isinstance(first, PredictionExample) and first.truth == "abcdefg"[labels[0]]
    assert [name for name, _ in first.predictions] == ["abcdefg"[i] for i in order[0, :3]]
    np.testing.assert_allclose([share for _, share in first.predictions], p[0, order[0, :3]], rtol=1e-4)
    np.testing.assert_array_equal(first.image, images[0])


def test_five_classes_or_fewer_have_no_top5(context, params, pictures):
    source = MemorySource(pictures(3), labels=(0, 1, 0), classes=("a", "b", "c"))
    narrow = params | {"head": params["head"][:, :3]}
    assert dict(TopKAccuracy(prefix="test").run(context(source, params=narrow))).keys() == {"test/top1", "test/loss"}


def test_a_constant_or_diverged_model_scores_nothing(context, params, pictures):
    source = MemorySource(pictures(9), labels=(0,) * 9, classes=tuple("abcdefg"))
    constant = dict(TopKAccuracy().run(context(source, params=params | {"head": 0 * params["head"]})))
    assert constant["val/top1"] == 0 and abs(constant["val/loss"] - np.log(CLASSES)) < 1e-6
    diverged = dict(TopKAccuracy().run(context(source, params=params | {"head": np.nan * params["head"]})))
    assert diverged["val/top5"] == 0 and np.isnan(diverged["val/loss"])
