import numpy as np
import pytest

from jaxmm.evals import TopKAccuracy, ZeroShot
from jaxmm.evals.average_precision import average_precisions
from jaxmm.evals.evaluation import measure
from jaxmm.evals.zero_shot import class_embeddings
from jaxmm.validation import ConfigError
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


def precisions(scores, truth):
    """Average precision by its definition: for each image of a class, the share of its images among those that score
    as high or higher; a wrong image with the same score is above, a right one is not below."""
    means = []
    for score, has in zip(scores.T, truth.T, strict=True):
        rows = sorted(range(len(score)), key=lambda row: (-score[row], has[row]))
        right = [place for place, row in enumerate(rows, 1) if has[row]]
        means.append(sum(count / place for count, place in enumerate(right, 1)) / len(right) if right else 0.0)
    return means


def test_average_precision_by_its_definition():
    by_hand = np.array([[0.9, 1, 1], [0.8, 1, 3], [0.7, 1, 2], [0.6, 1, 0]])
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
    assert average_precisions(by_hand, truth).tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2, 0])
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, (23, 5)).astype(float), rng.random((23, 5)) < 0.3
    np.testing.assert_allclose(average_precisions(scores, truth), precisions(scores, truth), rtol=1e-12)


class Tagged(MemorySource):
    """Images with several labels; the last image is broken."""

    tags = NAMES
    templates = ("a {}", "{} of {}")

    def __getitem__(self, i):
        return super().__getitem__(i) | {"tags": self.tags_of(i)}

    def tags_of(self, index):
        return tuple(tag for tag in range(6) if (index * 5 + tag * tag) % 7 < 2)     # class 6 never occurs


def test_several_labels_per_image(context, params, pictures):
    source = Tagged((*pictures(13), b"broken"))
    result = measure(context(source), ZeroShot(batch_size=4), with_predictions=True)
    weights = []
    for name in NAMES:
        _, _, t = numpy_outputs(params, source, [template.replace("{}", name) for template in source.templates])
        weights.append(unit(unit(t).mean(axis=0)))
    scores = unit(numpy_outputs(params, source)[0]) @ np.array(weights).T
    truth = np.array([[tag in source.tags_of(row) for tag in range(7)] for row in range(13)])
    want = precisions(scores, truth)
    assert result.metrics == {"zero_shot_map": pytest.approx(np.mean(want))} and want[6] == 0 < want[0] < 1
    assert result.per_class == pytest.approx(dict(zip(NAMES[:6], want, strict=False))) and not result.intervals
    assert result.predictions[2] == (
        "2", ", ".join(NAMES[tag] for tag in source.tags_of(2)), NAMES[scores[2].argmax()])
    with pytest.raises(ConfigError, match="TopKAccuracy needs labels"):
        measure(context(source), TopKAccuracy())
