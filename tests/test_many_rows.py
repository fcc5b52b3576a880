"""Compiled reductions over many rows against numpy in fp64.

jaxlib 0.10.2 miscompiles some sums of products on CPU above 32,768 rows (jax#39103); these are the ones that we have.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxmm.losses import classification, contrastive, image_text_matching, language_modeling
from jaxmm.losses.blockwise import Softmax, blockwise_contrastive
from jaxmm.nn.attention import attend, causal_mask, fused_attend
from jaxmm.nn.transformer import TransformerConfig, layer_norm
from tests.reference import softmax
from tests.xla import THOROUGH

ROWS = pytest.mark.parametrize("rows", [
    40_000, pytest.param(20_000, marks=pytest.mark.long), pytest.param(200_000, marks=pytest.mark.long)])


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(function, inputs, cotangent, value, gradients, tolerance=2e-5):
    """Compare a function and its gradients, compiled as users do, each by the largest absolute value."""
    def both(*inputs):
        out, back = jax.vjp(function, *inputs)
        return out, back(cotangent)

    got = jax.jit(both, compiler_options=THOROUGH)(*inputs)
    for ours, want in zip(jax.tree.leaves(got), [value, *gradients], strict=True):
        assert np.abs(np.asarray(ours, np.float64) - want).max() <= tolerance * np.abs(want).max()


@ROWS
def test_sums_of_products(rows):
    for width in (3, 64):
        a, b, g = draw((rows, width), (rows, width), (rows,))
        a64, b64, g64 = (x.astype(np.float64) for x in (a, b, g))
        check(lambda a, b: (a * b).sum(axis=-1), (a, b), jnp.asarray(g), (a64 * b64).sum(axis=-1),
              (g64[:, None] * b64, g64[:, None] * a64))


@ROWS
def test_layer_norm(rows):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer_norm(TransformerConfig(width=24, depth=1, heads=1, mlp_dim=8, eps=1e-5), "norm")(x)

    x, g, scale, bias = draw((rows, 24), (rows, 24), (24,), (24,))
    x64, g64, s64 = x.astype(np.float64), g.astype(np.float64), scale.astype(np.float64)
    deviation = np.sqrt(x64.var(axis=1, keepdims=True) + 1e-5)
    unit, h = (x64 - x64.mean(axis=1, keepdims=True)) / deviation, g64 * s64
    d_x = (h - h.mean(axis=1, keepdims=True) - unit * (h * unit).mean(axis=1, keepdims=True)) / deviation
    check(lambda x, scale, bias: Norm().apply({"params": {"norm": {"scale": scale, "bias": bias}}}, x),
          (x, scale, bias), jnp.asarray(g), unit * s64 + bias, (d_x, (g64 * unit).sum(axis=0), g64.sum(axis=0)))


@ROWS
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(rows, fused, causal):
    """`rows` queries of all heads together, which is what the sums over width run over."""
    b, t, h, k = rows // 10, 5, 2, 8
    q, key, v, g = draw(*[(b, t, h, k)] * 4)
    mask = causal_mask(t) if causal else None

    def function(q, key, v):
        return fused_attend(q, key, v, mask) if fused else attend(q, key, v, mask)[0]

    q64, k64, v64, g64 = (x.astype(np.float64).swapaxes(1, 2) for x in (q, key, v, g))
    scores = q64 @ k64.swapaxes(2, 3) / np.sqrt(k)
    weights = softmax(np.where(np.tril(np.ones((t, t), bool)) | (not causal), scores, -np.inf))
    d_weights = g64 @ v64.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / np.sqrt(k)
    wanted = weights @ v64, d_scores @ k64, d_scores.swapaxes(2, 3) @ q64, weights.swapaxes(2, 3) @ g64
    value, *gradients = (x.swapaxes(1, 2) for x in wanted)
    check(function, (q, key, v), jnp.asarray(g), value, gradients)


ONE = jnp.ones(())


@ROWS
def test_losses_of_rows(rows):
    """Each loss by its definition, with the gradient of the logits."""
    logits, others = draw((rows, 7), (rows, 7), seed=1)
    l64 = logits.astype(np.float64)
    p, log_p = softmax(l64), np.log(softmax(l64))
    targets = softmax(others.astype(np.float64))
    t32 = jnp.asarray(targets, jnp.float32)
    check(lambda x: classification.cross_entropy(x, t32), (logits,), ONE, -(targets * log_p).sum(axis=1).mean(),
          [(p - targets) / rows])
    check(lambda x: contrastive.soft_contrastive(x, t32), (logits,), ONE, -(targets * log_p).sum(axis=1).mean(),
          [(p - targets) / rows])
    sigmoid = 1 / (1 + np.exp(-l64))
    check(lambda x: classification.sigmoid_cross_entropy(x, t32), (logits,), ONE,
          -(targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid)).sum(axis=1).mean(),
          [(sigmoid - targets) / rows])
    positive = others > 0.3
    positive[:, 2] = True
    hard = 0.4 * p + 0.6 * positive / positive.sum(axis=1, keepdims=True)
    check(lambda x: contrastive.distilled_targets(x, jnp.asarray(positive), jnp.float32(0.4)), (logits,),
          jnp.ones((rows, 7)), hard, [np.zeros((rows, 7))])
    labels, counts = others[:, 0] > 0, others[:, 1] > 0
    two = softmax(l64[:, :2])
    chosen = np.stack([~labels, labels], 1)
    check(lambda x: image_text_matching.matching_loss(x, jnp.asarray(labels, jnp.int32), jnp.asarray(counts))[0],
          (logits[:, :2],), ONE, -(np.log(two) * chosen)[counts].sum() / counts.sum(),
          [(two - chosen) * counts[:, None] / counts.sum()])


@ROWS
def test_language_loss(rows):
    b, t, v = rows // 5, 5, 11
    logits, = draw((b, t, v), seed=2)
    rng = np.random.default_rng(3)
    tokens, counts = rng.integers(0, v, (b, t)), rng.random((b, t)) < 0.7
    l64 = logits[:, :-1].astype(np.float64)
    wanted = np.eye(v)[tokens[:, 1:]] * 0.9 + 0.1 / v
    counted = counts[:, 1:, None]
    total = counted.sum()
    gradient = np.zeros(logits.shape)
    gradient[:, :-1] = (softmax(l64) - wanted) * counted / total
    check(lambda x: language_modeling.language_loss(x, jnp.asarray(tokens, jnp.int32), jnp.asarray(counts), 0.1),
          (logits,), ONE, -(wanted * np.log(softmax(l64)) * counted).sum() / total, [gradient])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_contrastive_losses(kind):
    """Logits [b b]: 40,000 rows of them do not fit; reductions of their sums of products run over b x b numbers."""
    rows, width = 1_200, 5
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in draw((rows, width), (rows, width), seed=4))
    loss = {"softmax": contrastive.softmax_contrastive, "sigmoid": contrastive.sigmoid_contrastive}[kind]
    positive = np.eye(rows, dtype=bool)
    positive[3, 8] = positive[8, 3] = True

    def function(image, text):
        return loss(contrastive.contrastive_logits(image, text, jnp.float32(9), jnp.float32(-1)), jnp.asarray(positive))

    value, gradients = square_loss(kind, image, text, positive, rows)
    check(function, (image, text), ONE, value, gradients)


@pytest.mark.long
@pytest.mark.parametrize("rows", [20_480, 40_960])
def test_contrastive_losses_in_blocks(rows):
    """The only way in which so many pairs are compared; numpy has a slice of the rows at a time."""
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in draw((rows, 5), (rows, 5), seed=5))
    value, gradients = square_loss("softmax", image, text, None, 512)

    def function(image, text):
        return blockwise_contrastive(Softmax, image, text, (None, None), jnp.float32(9), jnp.float32(-1), tile=2_048)[0]

    check(function, (image, text), ONE, value, gradients, tolerance=1e-4)


def square_loss(kind, image, text, positive, step):
    """Value and gradients of a contrastive loss with scale 9 and bias -1, `step` rows at a time."""
    x, y = image.astype(np.float64), text.astype(np.float64)
    rows = len(x)

    def logits(start):
        return 9 * x[start:start + step] @ y.T - 1

    columns = sum(np.exp(logits(start)).sum(axis=0) for start in range(0, rows, step))
    here = np.eye(rows, dtype=bool) if positive is None and rows <= 4_096 else positive
    value, d_x, d_y = 0.0, np.zeros_like(x), np.zeros_like(y)
    for start in range(0, rows, step):
        score = logits(start)
        if here is None:
            mine = np.zeros(score.shape)
            mine[np.arange(len(score)), start + np.arange(len(score))] = 1
        else:
            mine = here[start:start + step].astype(float)
        if kind == "sigmoid":
            sign = 2 * mine - 1
            value += np.log1p(np.exp(-sign * score)).sum() / rows
            d_score = -sign / (1 + np.exp(sign * score)) / rows
        else:
            total = np.exp(score).sum(axis=1, keepdims=True)
            by_row = mine / mine.sum(axis=1, keepdims=True)
            by_column = mine / (1 if here is None else here.sum(axis=0))
            value -= ((by_row * (score - np.log(total))) + by_column * (score - np.log(columns))).sum() / (2 * rows)
            d_score = (np.exp(score) / total - by_row + np.exp(score) / columns - by_column) / (2 * rows)
        d_x[start:start + step] = 9 * d_score @ y
        d_y += 9 * d_score.T @ x[start:start + step]
    return value, (d_x, d_y)
