"""Attention on TPU as two Pallas kernels: the scores of an image's heads stay in on-chip memory (VMEM).

XLA writes scores to HBM and reads them again for each step of the softmax, with rows of 257 padded to 384: that took
half of CLIP's training step on TPU. Texts and images are short, so a full row of scores fits beside its keys and
values, and neither pass needs FlashAttention's running sums (Dao et al. 2022). The backward pass recomputes the scores
and stores only queries, keys and values.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxmm.sharding import BATCH, TOKENS, axis_sizes, divides_mesh, on_each_device

VMEM_BYTES = 12 * 2**20
"""On-chip memory that one step of a kernel may use; XLA grants 16 MiB."""
LANES = 128
A_BT, A_B, AT_B = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
"""Dimension numbers of the products a b', a b and a' b."""

_Mask = Bool[Array, "#b 1 #t s"]


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scores(q, k, mask, scale):
    scores = _dot(q, k, A_BT) * scale
    return scores if mask is None else jnp.where(mask[...] != 0, scores, jnp.finfo(jnp.float32).min)


def _forward(*refs, heads, scale):
    """Compute the attention output of one image, head by head."""
    query, key, value, *mask, out = refs
    width = query.shape[-1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        v = value[:, at]
        scores = _scores(query[:, at], key[:, at], *mask or (None,), scale)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mean = _dot(weights.astype(v.dtype), v, A_B) / weights.sum(axis=-1, keepdims=True)
        out[:, at] = mean.astype(out.dtype)


def _backward(*refs, heads, scale):
    """Compute the gradients of one image's queries, keys and values, head by head."""
    query, key, value, gradient, *mask, d_query, d_key, d_value = refs
    width = query.shape[-1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        q, k, v, g = query[:, at], key[:, at], value[:, at], gradient[:, at]
        scores = _scores(q, k, *mask or (None,), scale)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        d_value[:, at] = _dot(weights.astype(g.dtype), g, AT_B).astype(d_value.dtype)
        d_weights = _dot(g, v, A_BT)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
        d_scores = d_scores.astype(q.dtype)
        d_query[:, at] = (_dot(d_scores, k, A_B) * scale).astype(d_query.dtype)
        d_key[:, at] = (_dot(d_scores, q, AT_B) * scale).astype(d_key.dtype)


def heads_at_once(t: int, s: int, heads: int, width: int, size: int) -> int:
    """Return how many heads of `width` fit in VMEM at `size` bytes per number; 0 if the smallest group does not fit."""
    for count in range(heads, 0, -1):
        if heads % count or (count < heads and count * width % LANES):
            continue
        blocks = 2 * count * width * size * (3 * t + 4 * s)      # the backward pass's blocks, double-buffered
        scores = 4 * 4 * _round_up(t, 8) * _round_up(s, LANES)
        if blocks + scores <= VMEM_BYTES:
            return count
    return 0


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _run(kernel, name, results, heads, interpret, arrays, mask):
    """Run `kernel` on arrays [b n d], image by image and some heads at a time.

    `results` are the indices of the inputs whose shapes the outputs have.
    """
    from jax.experimental import pallas as pl  # a fifth of a second of import that the other platforms do without
    from jax.experimental.pallas import tpu as pltpu

    (b, t, d), s = arrays[0].shape, arrays[1].shape[1]
    width = d // heads
    count = heads_at_once(t, s, heads, width, arrays[0].dtype.itemsize)

    def block(x):
        return pl.BlockSpec((None, x.shape[1], count * width), lambda i, j: (i, 0, j))

    inputs, specs = list(arrays), [block(x) for x in arrays]
    if mask is not None:
        per_image = mask.shape[0] > 1
        specs.append(pl.BlockSpec((None, *mask.shape[1:]), lambda i, j: (i if per_image else 0, 0, 0)))
        inputs.append(mask)
    return pl.pallas_call(
        partial(kernel, heads=count, scale=width**-0.5), grid=(b, heads // count), in_specs=specs,
        out_specs=[block(arrays[i]) for i in results],
        out_shape=[jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=f"{name}_of_{heads}_heads", interpret=interpret)(*inputs)


def _run_sharded(kernel, name, results, arrays, mask, interpret):
    """Call `_run` on every device's images and heads; `arrays` are [b n h k]."""
    heads, spec = arrays[0].shape[2] // axis_sizes()["tensor"], None
    run = partial(_run, kernel, name, results, heads, interpret)
    flat = [x.reshape(*x.shape[:2], -1) for x in arrays]      # as [h k] the last axis would be padded
    if mask is not None:
        mask = mask[:, 0].astype(jnp.int32)
        spec = PartitionSpec(BATCH if mask.shape[0] > 1 else None)
    outputs = on_each_device(run, (TOKENS, spec), TOKENS)(flat, mask)
    return [x.reshape(arrays[i].shape) for x, i in zip(outputs, results, strict=True)]


def is_supported(query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], mask: Array | None) -> bool:
    """Return whether the kernels can compute this attention: rows short enough, one mask for all heads, and batch and
    heads divisible by the current mesh."""
    b, t, heads, width = query.shape
    tensor = axis_sizes()["tensor"]
    if not divides_mesh(b, heads) or (mask is not None and mask.shape[1] > 1):
        return False
    return heads_at_once(t, key.shape[1], heads // tensor, width, query.dtype.itemsize) > 0


def attention(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    mask: _Mask | None = None, *, interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """Return the output of `attend`, computed by one kernel. `interpret` runs it in plain JAX on any platform."""
    return _run_sharded(_forward, "attention", (0,), [query, key, value], mask, interpret)[0]


def gradients(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    gradient: Float[Array, "b t h k"], mask: _Mask | None = None, *, interpret: bool = False,
) -> list[Array]:
    """Return the gradients of queries, keys and values, computed by one kernel."""
    return _run_sharded(_backward, "attention_gradients", (0, 1, 2), [query, key, value, gradient], mask, interpret)
