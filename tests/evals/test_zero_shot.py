import numpy as np
import pytest

from jaxmm.evals import ZeroShot
from jaxmm.evals.zero_shot import class_embeddings
from tests.evals.conftest import LinearTask, MemorySource, numpy_outputs

NAMES = ("cat", "dog", "red_fox", "owl", "eel", "bee", "ant")
TEMPLATES = ("{} a", "b {}", "{}")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True, ids=str)
def test_against_numpy(mesh, context, params, pictures):
    labels = tuple(np.random.default_rng(4).integers(0, 7, 13).tolist())
    source = MemorySource(pictures(13), labels=labels, classes=NAMES)
    ctx = context(source, mesh)
    got = dict(ZeroShot(templates=TEMPLATES, batch_size=8).run(ctx))

    weights = []
    for name in NAMES:
        _, _, t = numpy_outputs(params, source, [template.format(name.replace("_", " ")) for template in TEMPLATES])
        weights.append(unit(unit(t).mean(axis=0)))
    x, _, _ = numpy_outputs(params, source)
    order = np.argsort(-unit(x) @ np.array(weights).T, axis=1)
    y = np.array(labels)
    assert got == {"val/zero_shot_top1": np.mean(order[:, 0] == y),
                   "val/zero_shot_top5": np.mean((order[:, :5] == y[:, None]).any(axis=1))}
    assert ctx.examples[0].truth == NAMES[labels[0]].replace("_", " ")


def test_each_template_weighs_the_same_whatever_the_length_of_its_embedding(context, params, pictures):
    ctx = context(MemorySource(pictures(2)), task=LinearTask(normalised=False))
    weights = class_embeddings(ZeroShot(templates=TEMPLATES, batch_size=4), ctx, ("x", "y"))
    _, _, t = numpy_outputs(params, ctx.val, [template.format("y") for template in TEMPLATES])
    np.testing.assert_allclose(weights[1], unit(unit(t).mean(axis=0)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-6)


def test_given_names_replace_the_source_s(context, params, pictures):
    source = MemorySource(pictures(4), labels=(0, 1, 2, 3), classes=NAMES)
    ctx = context(source)
    dict(ZeroShot(classes=tuple(n.upper() for n in NAMES)).run(ctx))
    assert [e.truth for e in ctx.examples] == ["CAT", "DOG", "RED_FOX", "OWL"]
