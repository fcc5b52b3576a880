"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1): a pure function, and the module that projects into it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmm.nn import gpu_attention, tpu_attention
from jaxmm.nn.precision import wide, widened
from jaxmm.sharding import all_gather_params, platform

Initializer = Callable[..., Array]
Mask = Bool[Array, "#b #h #t #s"]


def causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    """Return the mask that lets each token attend to itself and to earlier tokens."""
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def attend(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    mask: Mask | None = None,
    *,
    dropout: float = 0.0,
    rng: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h k"], Float[Array, "b h t s"]]:
    """Return the attention output and its weights softmax(q k' / sqrt(k)) in fp32, which are 0 where `mask` is False.

    The compiler drops the weights if they are not used. `dropout` is the share of them set to zero if `rng` is given.
    """
    query = query * (query.shape[-1] ** -0.5)
    scores = jnp.einsum("bthk,bshk->bhts", query, key, preferred_element_type=wide(query.dtype))
    if mask is not None:  # the scores are fp32 here, so that finfo.min fits
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropped = jax.nn.softmax(scores)
    if rng is not None and dropout > 0:
        kept = jax.random.bernoulli(rng, 1 - dropout, weights.shape)
        dropped = weights * kept.astype(weights.dtype) / (1 - dropout)
    return jnp.einsum("bhts,bshk->bthk", dropped.astype(value.dtype), value), weights


def fused_attend(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    mask: Mask | None = None,
) -> Float[Array, "b t h k"]:
    """Return the output of `attend` without storing the weights."""
    if gpu_attention.is_supported(query, mask):
        return name_for_remat(gpu_attention.attention(query, key, value), "attention")
    return _fused_attend(query, key, value, mask)


@jax.custom_vjp
def _fused_attend(
    query: Float[Array, "b t h k"], key: Float[Array, "b s h k"], value: Float[Array, "b s h k"],
    mask: Mask | None = None,
) -> Float[Array, "b t h k"]:
    """Attend; the backward pass recomputes the weights from the log of their sums (FlashAttention, Dao et al. 2022,
    section 3.1). The forward pass divides by the sums after the product with the values, which is smaller."""
    return _fused_residuals(query, key, value, mask)[0]


def name_for_remat(x: Float[Array, "b t h k"], name: str) -> Float[Array, "b t h k"]:
    """Name `x` for remat policies, in a shape whose last axis needs no padding on TPU."""
    return checkpoint_name(x.reshape(*x.shape[:2], -1), name).reshape(x.shape)


def to_bhtd(x: Float[Array, "b t h k"]) -> Float[Array, "b h t k"]:
    """Transpose to the layout that batched matrix products read."""
    return x.swapaxes(1, 2)


def _attention(query, k, v, mask):
    """Return the attention output and the log-sum-exp of the scores [b h t]; `k` and `v` are [b h s k]."""
    query = to_bhtd(query * query.shape[-1] ** -0.5)
    kind = {"preferred_element_type": wide(v.dtype)}
    scores = jnp.einsum("bhtk,bhsk->bhts", query, k, **kind)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v, **kind) / total
    return to_bhtd(out).astype(v.dtype), (highest + jnp.log(total))[..., 0]


def _fused(query, key, value, mask):
    return _attention(query, to_bhtd(key), to_bhtd(value), mask)


def _fused_on_tpu(query, key, value, mask):
    """Run the TPU kernel, whose backward pass does not need the log-sum-exp."""
    b, t, h, _ = query.shape
    return tpu_attention.attention(query, key, value, mask), jnp.zeros((b, h, t), wide(value.dtype))


def _fused_residuals(query, key, value, mask):
    inputs = query, key, value, mask
    if tpu_attention.is_supported(query, key, mask):
        out, log_total = jax.lax.platform_dependent(*inputs, tpu=_fused_on_tpu, default=_fused)
    else:
        out, log_total = _fused(*inputs)
    out, log_total = name_for_remat(out, "attention"), checkpoint_name(log_total, "attention")
    return out, (query, key, value, out, log_total, mask)


def _fused_backward(residuals, gradient):
    query, key, *_, mask = residuals
    if not tpu_attention.is_supported(query, key, mask):
        return *_fused_gradients(*residuals, gradient), None

    def kernel(query, key, value, out, log_total, mask, gradient):
        return tuple(tpu_attention.gradients(query, key, value, gradient, mask))

    return *jax.lax.platform_dependent(*residuals, gradient, tpu=kernel, default=_fused_gradients), None


def _fused_gradients(query, key, value, out, log_total, mask, gradient):
    """Compute the gradients with scores laid out as [b h s t], which saves a transposed copy of them."""
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    kind = {"preferred_element_type": wide(dtype)}
    delta = (widened(gradient) * widened(out)).sum(axis=-1).swapaxes(1, 2)  # [b h t]
    q, k, v, g = to_bhtd(query * scale), to_bhtd(key), to_bhtd(value), to_bhtd(gradient)
    with jax.named_scope("recomputed"):
        scores = jnp.einsum("bhsk,bhtk->bhst", k, q, **kind)
    weights = jnp.exp(scores - log_total[:, :, None])
    if mask is not None:
        weights = jnp.where(mask.swapaxes(-1, -2), weights, 0.0)
    d_value = jnp.einsum("bhst,bhtk->bhsk", weights.astype(dtype), g)
    d_scores = weights * (jnp.einsum("bhsk,bhtk->bhst", v, g, **kind) - delta[:, :, None])
    d_scores = d_scores.astype(dtype)
    d_key = jnp.einsum("bhst,bhtk->bhsk", d_scores, q)
    d_query = jnp.einsum("bhst,bhsk->bhtk", d_scores, k) * scale
    return tuple(to_bhtd(x).astype(dtype) for x in (d_query, d_key, d_value))


_fused_attend.defvjp(_fused_residuals, _fused_backward)


class Linear(nn.Module):
    """x @ kernel + bias over the last `inputs` dimensions of x, which become `features`.

    One product of two matrices, whatever the shapes: the bias's gradient is then a sum over one axis, which XLA
    does several times faster on CPU than over two. On TPU the batch dimensions stay, because flattening would copy
    token rows that are not a multiple of a tile. The bias is added in its own precision, in which its gradient is
    summed. On GPU the product is rounded first: its kernels would otherwise write fp32 results, and a ViT-L/16 step
    took 277 ms instead of 181 (H200).
    """

    features: tuple[int, ...]
    inputs: int = 1
    dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b"]) -> Float[Array, "*c"]:
        """Map x. `kernel_init` is called with the kernel's shape as a matrix."""
        batch, contracted = x.shape[: -self.inputs], x.shape[-self.inputs:]
        shape = math.prod(contracted), math.prod(self.features)

        def init(rng):
            return self.kernel_init(rng, shape).reshape(*contracted, *self.features)

        kernel = self.param("kernel", init)
        backend = platform()
        summed = self.dtype if backend == "gpu" else kernel.dtype
        kernel = all_gather_params(kernel.astype(self.dtype), "/".join((*self.path, "kernel"))).reshape(shape)
        x = x.astype(self.dtype).reshape(*(batch if backend == "tpu" else (-1,)), shape[0])
        product = _few_rows if backend == "cpu" and batch[1:] == (1,) and 1 < batch[0] <= 16 else jnp.matmul
        y = product(x, kernel, preferred_element_type=summed)
        if self.bias:
            bias = self.param("bias", self.bias_init, self.features).reshape(-1)
            y = y + jnp.expand_dims(bias, range(y.ndim - 1))
        return y.astype(self.dtype).reshape(*batch, *self.features)


def _few_rows(x, kernel, **kind):
    """Return x @ kernel for the newest token of a few sequences, where XLA's plain product on CPU takes half as long
    again.

    The barriers keep XLA from folding the transposes into the product; that of the kernel is done before the loop.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(jnp.matmul(barrier(kernel.T), barrier(x.T), **kind)).T


KeysValues = tuple[Float[Array, "b s h k"], Float[Array, "b s h k"]]
"""Projected keys and values of a context."""
CachedKeysValues = tuple[Float[Array, "b h s k"], Float[Array, "b h s k"]]
"""Keys and values laid out by head, for a cache that is read many times: no transpose is needed then."""


def add_to_cache(
    cache: CachedKeysValues, new: tuple[Float[Array, "b 1 h k"], Float[Array, "b 1 h k"]], position: Int[Array, ""]
) -> CachedKeysValues:
    """Return `cache` with the keys and values of the token at `position`."""
    return tuple(jax.lax.dynamic_update_slice_in_dim(old, to_bhtd(token).astype(old.dtype), position, axis=2)
                 for old, token in zip(cache, new, strict=True))


class Attention(nn.Module):
    """Multi-head attention of `x` over `context`, with projections of width `d = h * k`, biased unless `bias` is False.
    """

    width: int
    heads: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    init_in: Initializer = nn.initializers.xavier_uniform()
    init_out: Initializer = nn.initializers.xavier_uniform()
    bias: bool = True

    def setup(self):
        """Declare the projections."""
        shape = (self.heads, self.width // self.heads)
        self.query, self.key, self.value = (
            Linear(shape, dtype=self.dtype, kernel_init=self.init_in, bias=self.bias) for _ in range(3))
        self.out = Linear((self.width,), inputs=2, dtype=self.dtype, kernel_init=self.init_out, bias=self.bias)

    def keys_values(self, context: Float[Array, "b s c"]) -> KeysValues:
        """Project a context to keys and values, for `attend`."""
        return name_for_remat(self.key(context), "projections"), name_for_remat(self.value(context), "projections")

    def attend(
        self, x: Float[Array, "b t d"], keys_values: KeysValues, mask: Mask | None = None, *, train: bool,
        weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t s"] | None]:
        """Return the attention output, and the attention weights if `weights`."""
        query, (key, value) = name_for_remat(self.query(x), "projections"), keys_values
        dropping = train and self.dropout > 0
        if weights or dropping:
            rng = self.make_rng("dropout") if dropping else None
            y, probabilities = attend(query, key, value, mask, dropout=self.dropout, rng=rng)
        else:
            y, probabilities = fused_attend(query, key, value, mask), None
        return self.out(y), probabilities if weights else None

    def attend_cached(
        self, x: Float[Array, "b t d"], cache: CachedKeysValues, mask: Mask | None = None
    ) -> Float[Array, "b t d"]:
        """Return the attention output over a cache, without dropout."""
        return self.out(_attention(self.query(x), *cache, mask)[0])

    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b s c"], mask: Mask | None = None, *, train: bool,
        weights: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h t s"] | None]:
        """Return the attention output, and the attention weights if `weights`."""
        return self.attend(x, self.keys_values(context), mask, train=train, weights=weights)
