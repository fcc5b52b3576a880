import numpy as np
import pytest

from jaxmm.evals import KNN, LinearProbe
from jaxmm.evals.knn import knn
from jaxmm.evals.probe import probe
from tests.evals.conftest import MemorySource, numpy_outputs


def blobs(n, seed, spread=0.4):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    return (np.eye(3, 5)[y] * 2 + spread * rng.normal(size=(n, 5))).astype(np.float32), y


def test_probe_minimises_the_regularised_cross_entropy():
    """The accuracy is that of the optimum found by plain gradient descent on the same objective."""
    (x, y), (held_x, held_y) = blobs(60, 0, 1.5), blobs(80, 1, 1.5)
    w, b, c = np.zeros((5, 3)), np.zeros(3), 0.316
    for _ in range(4000):
        logits = x @ w + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        slope = p / p.sum(axis=1, keepdims=True) - np.eye(3)[y]
        w, b = w - 0.02 * (c * x.T @ slope + w), b - 0.02 * c * slope.sum(axis=0)
    want = np.mean((held_x @ w + b).argmax(axis=1) == held_y)
    assert 0.5 < want < 0.95
    assert probe(x, y, held_x, held_y, c=(c,), max_iter=1000) == want


def test_probe_chooses_among_strengths_without_the_held_out_set():
    (x, y), (held_x, held_y) = blobs(90, 2), blobs(50, 3)
    x, held_x = 1e-3 * x, 1e-3 * held_x                        # weak features: a strong penalty leaves only the prior
    y[:40] = 0
    x[:40] = blobs(40, 5)[0] * 1e-3 * 0 + np.array([2e-3, 0, 0, 0, 0], np.float32)
    weak, strong = (probe(x, y, held_x, held_y, c=(c,), max_iter=1000) for c in (1e-6, 1e6))
    assert strong > weak + 0.3
    assert probe(x, y, held_x, held_y, c=(1e-6, 1e6), max_iter=1000) == strong


@pytest.mark.parametrize("k", [1, 4, 99])
def test_knn_against_brute_force(k):
    (x, y), (held_x, held_y) = blobs(40, 6, 1.2), blobs(30, 7, 1.2)
    right = 0
    for query, label in zip(held_x, held_y, strict=True):
        cosine = x @ query / np.linalg.norm(x, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for i in np.argsort(-cosine)[:k]:
            votes[y[i]] += np.exp(cosine[i] / 0.07)
        right += votes.argmax() == label
    assert 0.5 < right / 30 < 1
    assert knn(x, y, held_x, held_y, k=k, temperature=0.07) == right / 30


def test_features_that_are_not_finite_are_not_scored():
    x, y = blobs(20, 8)
    assert np.isnan(knn(x, y, np.full_like(x, np.nan), y, k=3, temperature=0.07))
    assert np.isnan(probe(np.full_like(x, np.inf), y, x, y, c=(1.0,), max_iter=10))


@pytest.mark.parametrize("mesh", [(2, 2, 2)], indirect=True, ids=str)
def test_both_read_frozen_features_of_the_two_sources(mesh, context, params, pictures):
    rng = np.random.default_rng(9)
    train, held_out = (MemorySource(pictures(n, n), labels=tuple(rng.integers(0, 3, n).tolist()), classes=tuple("abc"))
                       for n in (30, 17))
    ctx = context(held_out, mesh, train=train)
    got = dict([*LinearProbe(batch_size=8).run(ctx), *KNN(batch_size=8, k=5).run(ctx)])
    features = [numpy_outputs(params, s)[0] for s in (train, held_out)]
    fitted, measured = ((x, np.array(s.labels)) for x, s in zip(features, (train, held_out), strict=True))
    assert got == {"val/probe_top1": probe(*fitted, *measured, c=(0.316,), max_iter=1000),
                   "val/knn_top1": knn(*fitted, *measured, k=5, temperature=0.07)}
