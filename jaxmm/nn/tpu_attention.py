"""Attention on TPU as two kernels: the scores of a picture's heads stay in the chip's own memory.

XLA writes scores out and reads them again for each of the softmax's steps, rows of 257 filled up to 384: that took half
of CLIP's training step on TPU. Texts and pictures are short, so that a whole row of scores fits beside its keys and
values, and neither pass needs FlashAttention's running sums (Dao et al. 2022): the backward pass computes the scores
again and keeps nothing but queries, keys and values.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxmm.sharding import BATCH, TOKENS, axis_sizes, divides_mesh, on_each_device

ROOM = 12 * 2**20
"""Bytes of the chip's own memory that a step of a kernel may take; XLA grants 16 MiB."""
LANES = 128
ROWS, BOTH, COLUMNS = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
"""Products a b', a b and a' b."""

_Mask = Bool[Array, "#b 1 #t s"]


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scores(q, k, mask, scale):
    scores = _dot(q, k, ROWS) * scale
    return scores if mask is None else jnp.where(mask[...] != 0, scores, jnp.finfo(jnp.float32).min)


def _forward(*refs, heads, scale):
    """A picture's attended values, head by head."""
    query, key, value, *mask, out = refs
    width = query.shape[-1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        v = value[:, at]
        scores = _scores(query[:, at], key[:, at], *mask or (None,), scale)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        attention = _dot(weights.astype(v.dtype), v, BOTH) / weights.sum(axis=-1, keepdims=True)
        out[:, at] = attention.astype(out.dtype)


def _backward(*refs, heads, scale):
    """The gradients of a picture's queries, keys and values, head by head."""
    query, key, value, gradient, *mask, d_query, d_key, d_value = refs
    width = query.shape[-1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        q, k, v, g = query[:, at], key[:, at], value[:, at], gradient[:, at]
        scores = _scores(q, k, *mask or (None,), scale)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        d_value[:, at] = _dot(weights.astype(g.dtype), g, COLUMNS).astype(d_value.dtype)
        d_weights = _dot(g, v, ROWS)
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
        d_scores = d_scores.astype(q.dtype)
        d_query[:, at] = (_dot(d_scores, k, BOTH) * scale).astype(d_query.dtype)
        d_key[:, at] = (_dot(d_scores, q, COLUMNS) * scale).astype(d_key.dtype)


def heads_at_once(t: int, s: int, heads: int, width: int, size: int) -> int:
    """Heads of `width` that fit in the chip's memory, `size` bytes a number; 0 where not even the fewest do."""
    for count in range(heads, 0, -1):
        if heads % count or (count < heads and count * width % LANES):
            continue
        blocks = 2 * count * width * size * (3 * t + 4 * s)      # the backward pass's, fetched ahead
        scores = 4 * 4 * _padded(t, 8) * _padded(s, LANES)
        if blocks + scores <= ROOM:
            return count
    return 0


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _run(kernel, name, results, heads, interpret, arrays, mask):
    """`kernel` on arrays [b n d], picture by picture and some heads at a time; `results` says like which arrays."""
    (b, t, d), s = arrays[0].shape, arrays[1].shape[1]
    width = d // heads
    count = heads_at_once(t, s, heads, width, arrays[0].dtype.itemsize)

    def block(x):
        return pl.BlockSpec((None, x.shape[1], count * width), lambda i, j: (i, 0, j))

    inputs, specs = list(arrays), [block(x) for x in arrays]
    if mask is not None:
        pictures = mask.shape[0] > 1
        specs.append(pl.BlockSpec((None, *mask.shape[1:]), lambda i, j: (i if pictures else 0, 0, 0)))
        inputs.append(mask)
    return pl.pallas_call(
        partial(kernel, heads=count, scale=width**-0.5), grid=(b, heads // count), in_specs=specs,
        out_specs=[block(arrays[i]) for i in results],
        out_shape=[jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=f"{name}_of_{heads}_heads", interpret=interpret)(*inputs)


def _spread(kernel, name, results, arrays, mask, interpret):
    """`_run` on every device's pictures and heads, of arrays [b n h k]."""
    heads, spec = arrays[0].shape[2] // axis_sizes()["tensor"], None
    run = partial(_run, kernel, name, results, heads, interpret)
    flat = [x.reshape(*x.shape[:2], -1) for x in arrays]      # of [h k] the chip would fill up the last axis
    if mask is not None:
        mask = mask[:, 0].astype(jnp.int32)
        spec = PartitionSpec(BATCH if mask.shape[0] > 1 else None)
    found = on_each_device(run, (TOKENS, spec), TOKENS)(flat, mask)
    return [x.reshape(arrays[i].shape) for x, i in zip(found, results, strict=True)]


def is_supported(query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], mask: Array | None) -> bool:
    """Whether the kernels can do it: short enough rows, no mask of its own for each head, and shares for all devices
    of the current mesh."""
    b, t, heads, width = query.shape
    tensor = axis_sizes()["tensor"]
    if not divides_mesh(b, heads) or (mask is not None and mask.shape[1] > 1):
        return False
    return heads_at_once(t, key.shape[1], heads // tensor, width, query.dtype.itemsize) > 0


def attention(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    mask: _Mask | None = None, *, interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """What `attend` gives, in one kernel. `interpret` runs it in plain JAX, anywhere."""
    return _spread(_forward, "attention", (0,), [query, key, value], mask, interpret)[0]


def gradients(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    gradient: Float[Array, "b t h k"], mask: _Mask | None = None, *, interpret: bool = False,
) -> list[Array]:
    """Of queries, keys and values, in one kernel."""
    return _spread(_backward, "attention_gradients", (0, 1, 2), [query, key, value, gradient], mask, interpret)
