"""Blockwise contrastive losses over a ring of devices: no device holds all logits, nor all embeddings.

Each device keeps its anchors (rows of the logits). Blocks of candidates (columns) move around the ring: a device
compares its anchors with the current block, tile by tile, and passes the block on together with that block's running
statistics, until every block is back. The backward pass goes around the ring again and recomputes the logits, so the
forward pass stores only a few numbers per row (tiles as in Inf-CL, Cheng et al. 2024; the ring as in SigLIP, Zhai et
al. 2023, section 3.3). Values and gradients equal those of `jaxmm.losses.contrastive`; memory is a few copies of a
device's own embeddings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmm.losses.contrastive import Ids
from jaxmm.sharding import BATCH, batch_shards, on_each_device

Keys = Int[Array, "_ k 2"]
"""Keys of examples: a row and a column are positives if they have the same key at the same index k."""
PairIds = tuple[Ids | None, Int[Array, "m 2"] | None]
"""Ids of images and of texts."""
NOT_IN_BATCH = -1
"""Position of a candidate that is not an example of the batch (a queue entry)."""


def pair_keys(ids: tuple[Ids | None, ...], positions: Int[Array, "n"]) -> Keys:
    """Return the keys of examples: their positions in the batch, and every entry of `ids` that is not None."""
    position = jnp.stack([positions, jnp.zeros_like(positions)], axis=1)
    return jnp.stack([position, *(key for key in ids if key is not None)], axis=1)


def caption_keys(ids: PairIds, images: int, texts: int) -> tuple[Keys, Keys]:
    """Return the keys of a batch's images and of its texts, from the `ids` of both.

    Each image has texts / images texts, one after the other.
    """
    (image_ids, text_ids), captions, positions = ids, texts // images, jnp.arange(images)
    own = () if text_ids is None else tuple(text_ids.reshape(images, captions, 2).swapaxes(0, 1))
    repeated = None if image_ids is None else jnp.repeat(image_ids, captions, axis=0)
    return (pair_keys((image_ids, *own), positions),
            pair_keys((repeated, *([text_ids] * captions)), jnp.repeat(positions, captions)))


def _positive_mask(rows: Keys, columns: Keys) -> Bool[Array, "r c"]:
    return (rows[:, None] == columns[None]).all(axis=-1).any(axis=-1)


class BlockLoss(Protocol):
    """Interface of a blockwise loss. `logits` holds one tile [r c] per row embedding: student, teacher if distilled.

    States and residuals are pytrees of vectors with one number per row or column.
    """

    def init(self, rows: int, columns: int) -> tuple[Any, Any]:
        """Return the states of rows and columns before the first tile."""

    def update(self, row: Any, column: Any, logits: tuple[Array, ...], positive: Array) -> tuple[Any, Any]:
        """Return the states of a tile's rows and columns with the tile added."""

    def finalize(self, row: Any, column: Any) -> tuple[Array, dict[str, Array], Any, Any]:
        """Return, for a device's rows and columns, the sum of losses (the caller divides by the number of all rows),
        per-row metrics to average by name, and the residuals of rows and columns."""

    def grad(self, row: Any, column: Any, logits: tuple[Array, ...], positive: Array) -> Array:
        """Return the derivative of the sum of losses with respect to `logits[0]`."""


class LogitSums(NamedTuple):
    """Running statistics of the logits of each row (or column), from which the cross-entropy follows."""

    highest: Float[Array, "n"]
    total: Float[Array, "n"]
    """Sum of exp(logit - highest)."""
    positive: Float[Array, "n"]
    """Sum of the logits of positives."""
    count: Float[Array, "n"]
    """Number of positives."""

    @classmethod
    def empty(cls, n: int) -> "LogitSums":
        """Return the statistics of zero logits."""
        return cls(jnp.full(n, -jnp.inf), *jnp.zeros((3, n)))

    def add(self, logits: Float[Array, "r c"], positive: Bool[Array, "r c"], axis: int) -> "LogitSums":
        """Add a tile, summed over `axis`."""
        highest = jnp.maximum(self.highest, logits.max(axis=axis))
        total = jnp.exp(logits - jnp.expand_dims(highest, axis)).sum(axis=axis)
        return LogitSums(highest, self.total * jnp.exp(self.highest - highest) + total,
                         self.positive + jnp.where(positive, logits, 0.0).sum(axis=axis),
                         self.count + positive.sum(axis=axis).astype(self.count.dtype))

    @property
    def log_total(self) -> Float[Array, "n"]:
        """Log-sum-exp of the logits."""
        return self.highest + jnp.log(self.total)


def _best_positive(row: Array, logits: Array, positive: Array) -> Array:
    """Update the largest logit of a positive per row."""
    return jnp.maximum(row, jnp.where(positive, logits, -jnp.inf).max(axis=1))


class Softmax:
    """Blockwise `softmax_contrastive`: the cross-entropies of both directions."""

    def __init__(self, captions: int = 1):
        self.captions = captions

    def init(self, rows, columns):
        """Return empty statistics."""
        return (LogitSums.empty(rows), jnp.full(rows, -jnp.inf)), LogitSums.empty(columns)

    def update(self, row, column, logits, positive):
        """Add the tile in both directions."""
        [s] = logits
        sums, best = row
        return (sums.add(s, positive, 1), _best_positive(best, s, positive)), column.add(s, positive, 0)

    def finalize(self, row, column):
        """Return log-sum-exp minus the mean logit of the positives."""
        sums, best = row
        rows, columns = ((side.log_total - side.positive / side.count).sum() for side in (sums, column))
        loss = (rows + columns / self.captions) / 2
        metrics = {"accuracy": (best >= sums.highest).astype(jnp.float32)}
        return loss, metrics, *((side.log_total, side.count) for side in (sums, column))

    def grad(self, row, column, logits, positive):
        """Return probabilities minus targets, averaged over both directions."""
        [s] = logits
        directions = (row[0][:, None], row[1][:, None]), (column[0][None], column[1][None])
        weight = positive.astype(s.dtype)
        rows, columns = (jnp.exp(s - log_total) - weight / count for log_total, count in directions)
        return (rows + columns / self.captions) / 2


class Sigmoid:
    """Blockwise `sigmoid_contrastive`: every pair separately."""

    def __init__(self, captions: int = 1):
        self.captions = captions

    def init(self, rows, columns):
        """Return, per row, the loss, the largest logit and the largest logit of a positive."""
        return (jnp.zeros(rows), *[jnp.full(rows, -jnp.inf)] * 2), ()

    def update(self, row, column, logits, positive):
        """Add the tile's losses."""
        [s] = logits
        loss, highest, best = row
        loss = loss - jax.nn.log_sigmoid(jnp.where(positive, s, -s)).sum(axis=1)
        return (loss, jnp.maximum(highest, s.max(axis=1)), _best_positive(best, s, positive)), column

    def finalize(self, row, column):
        """Return the loss; the backward pass needs no residuals."""
        loss, highest, best = row
        return loss.sum() / self.captions, {"accuracy": (best >= highest).astype(jnp.float32)}, (), ()

    def grad(self, row, column, logits, positive):
        """Return -sign * sigmoid(-sign * logit), with sign 1 for positives and -1 for negatives."""
        [s] = logits
        return jnp.where(positive, -jax.nn.sigmoid(-s), jax.nn.sigmoid(s)) / self.captions


class Distilled:
    """Blockwise `soft_contrastive` with `distilled_targets`: rows only, `logits` = (student's, teacher's).

    Columns have no state.
    """

    def __init__(self, alpha: Float[Array, ""]):
        self.alpha = alpha

    def init(self, rows, columns):
        """Return the student's statistics, the teacher's sum, and the student's logits weighted by the teacher."""
        return (LogitSums.empty(rows), jnp.full(rows, -jnp.inf), *jnp.zeros((2, rows))), ()

    def update(self, row, column, logits, positive):
        """Add the tile."""
        s, teacher = logits
        sums, before, total, weighted = row
        highest = jnp.maximum(before, teacher.max(axis=1))
        rescale, weights = jnp.exp(before - highest), jnp.exp(teacher - highest[:, None])
        return (sums.add(s, positive, 1), highest, total * rescale + weights.sum(axis=1),
                weighted * rescale + (weights * s).sum(axis=1)), column

    def finalize(self, row, column):
        """Return log-sum-exp minus the mean logit under the targets."""
        sums, highest, total, weighted = row
        mean = self.alpha * weighted / total + (1 - self.alpha) * sums.positive / sums.count
        return (sums.log_total - mean).sum(), {}, (sums.log_total, sums.count, highest + jnp.log(total)), ()

    def grad(self, row, column, logits, positive):
        """Return probabilities minus targets."""
        s, teacher = logits
        log_total, count, teacher_log_total = (x[:, None] for x in row)
        target = self.alpha * jnp.exp(teacher - teacher_log_total) + (1 - self.alpha) * positive.astype(s.dtype) / count
        return jnp.exp(s - log_total) - target


class Anchors(NamedTuple):
    """Rows of the logits, which stay on their device: one or two embeddings per row, and keys."""

    embeddings: tuple[Float[Array, "r e"], ...]
    """The student's, which gets gradients, and the teacher's if there is one."""
    keys: Keys


class Candidates(NamedTuple):
    """Columns of the logits, which move around the ring: parts (batch, queue) that are all sharded over the devices."""

    embeddings: tuple[Float[Array, "_ e"], ...]
    keys: tuple[Keys, ...]


def _tile_size(size: int, largest: int) -> int:
    """Return the largest divisor of `size` that is at most `largest`."""
    return next(tile for tile in range(min(size, largest), 0, -1) if size % tile == 0)


def _over_tiles(update: Callable, tile: int, rows: Any, columns: Any, row_state: Any, column_state: Any):
    """Call `update(rows, columns, row_state, column_state)` for every tile and return the updated states."""
    sizes = [len(jax.tree.leaves(tree)[0]) for tree in (rows, columns)]
    tiles = [_tile_size(size, tile) for size in sizes]
    across = sizes[1] // tiles[1]

    def body(i, states):
        starts = i // across * tiles[0], i % across * tiles[1]

        def read(tree, side):
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, starts[side], tiles[side]), tree)

        def write(tree, part, side):
            return jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, starts[side], 0), tree, part)

        new = update(read(rows, 0), read(columns, 1), read(states[0], 0), read(states[1], 1))
        return write(states[0], new[0], 0), write(states[1], new[1], 1)

    count = sizes[0] // tiles[0] * across
    if count == 1:
        return update(rows, columns, row_state, column_state)
    return jax.lax.fori_loop(0, count, body, (row_state, column_state))


def _ring(update: Callable, devices: int, columns: Any, row_state: Any, column_state: Any):
    """Call `update(columns, row_state, column_state)` with each device's block of columns in turn."""
    next_device = [(i, (i + 1) % devices) for i in range(devices)]

    def step(_, carry):
        columns, row_state, column_state = carry
        following = jax.lax.ppermute(columns, BATCH, next_device)   # overlaps with the update
        row_state, column_state = update(columns, row_state, column_state)
        return following, row_state, jax.lax.ppermute(column_state, BATCH, next_device)

    if devices == 1:
        return update(columns, row_state, column_state)
    return jax.lax.fori_loop(0, devices, step, (columns, row_state, column_state))[1:]


def _logits(rows: Anchors, columns: Candidates, scale: Array, bias: Array) -> tuple[Array, ...]:
    return tuple(scale * x @ columns.embeddings[0].T + bias for x in rows.embeddings)


def _concatenate(columns: Candidates) -> Candidates:
    """Concatenate a device's shares of all parts into one block."""
    return Candidates((jnp.concatenate(columns.embeddings),), (jnp.concatenate(columns.keys),))


def _forward_on_device(make, tile, devices, rows, columns, scale, bias, options):
    """Compute the loss and metrics, which all devices share, and this device's residuals."""
    loss_fn, block = make(*options), _concatenate(columns)

    def update(block, row_state, column_state):
        return _over_tiles(lambda r, c, *states: loss_fn.update(*states, _logits(r, c, scale, bias),
                                                               _positive_mask(r.keys, c.keys[0])),
                           tile, rows, block, row_state, column_state)

    row, column = _ring(update, devices, block, *loss_fn.init(len(rows.keys), len(block.keys[0])))
    loss, metrics, row, column = loss_fn.finalize(row, column)
    count = len(rows.keys) * devices
    summed = jax.tree.map(lambda x: jax.lax.psum(x, BATCH) if devices > 1 else x, (loss, {
        name: values.sum() for name, values in metrics.items()}))
    return *jax.tree.map(lambda x: x / count, summed), row, column


def _backward_on_device(make, tile, devices, rows, columns, scale, bias, options, row, column, gradient):
    """Compute the gradients of this device's rows and columns, and those of scale and bias."""
    loss_fn, block = make(*options), _concatenate(columns)
    factor = gradient / (len(rows.keys) * devices)

    def update(block_and_residuals, row_state, column_state):
        def add_tile(r, c, row_state, column_state):
            (r, row), (c, column) = r, c
            with jax.named_scope("recomputed"):
                logits = _logits(r, c, scale, bias)
            grad = factor * loss_fn.grad(row, column, logits, _positive_mask(r.keys, c.keys[0]))
            d_row, d_bias = row_state
            d_row = d_row + scale * grad @ c.embeddings[0]
            return (d_row, d_bias + grad.sum(axis=1)), column_state + scale * grad.T @ r.embeddings[0]
        return _over_tiles(add_tile, tile, (rows, row), block_and_residuals, row_state, column_state)

    x, y = rows.embeddings[0], block.embeddings[0]
    (d_rows, d_bias), d_columns = _ring(update, devices, (block, column),
                                        (jnp.zeros_like(x), jnp.zeros(len(x))), jnp.zeros_like(y))
    d_scale = (d_rows * x).sum() / scale
    d_scale, d_bias = (jax.lax.psum(g, BATCH) if devices > 1 else g for g in (d_scale, d_bias.sum()))
    ends = [sum(len(part) for part in columns.embeddings[:i + 1]) for i in range(len(columns.embeddings) - 1)]
    return d_rows, tuple(jnp.split(d_columns, ends)), d_scale, d_bias


def _on_every_device(function: Callable, inputs: tuple[bool, ...], outputs: tuple[bool, ...]) -> Callable:
    """Map `function(devices, ...)` over the devices; True marks sharded arguments and results, False replicated."""
    specs = {True: PartitionSpec(BATCH), False: PartitionSpec()}
    return on_each_device(partial(function, batch_shards()), tuple(specs[sharded] for sharded in inputs),
                          tuple(specs[sharded] for sharded in outputs))


_INPUTS = (True, True, False, False, False)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(make, tile, rows, columns, scale, bias, options):
    return _blockwise_forward(make, tile, rows, columns, scale, bias, options)[0]


def _blockwise_forward(make, tile, rows, columns, scale, bias, options):
    run = _on_every_device(partial(_forward_on_device, make, tile), _INPUTS, (False, False, True, True))
    loss, metrics, row, column = run(rows, columns, scale, bias, options)
    return (loss, metrics), (rows, columns, scale, bias, options, row, column)


def _blockwise_backward(make, tile, residuals, gradient):
    run = _on_every_device(partial(_backward_on_device, make, tile), (*_INPUTS, True, True, False),
                           (True, True, False, False))
    d_rows, d_columns, d_scale, d_bias = run(*residuals, gradient[0])
    rest = tuple(jnp.zeros_like(x) for x in residuals[0].embeddings[1:])
    return (Anchors((d_rows, *rest), None), Candidates(d_columns, (None,) * len(d_columns)), d_scale, d_bias,
            jax.tree.map(jnp.zeros_like, residuals[4]))


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def blockwise_loss(
    make: Callable[..., BlockLoss], rows: Anchors, columns: Candidates, scale: Float[Array, ""], bias: Float[Array, ""],
    *options: Float[Array, ""], tile: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the loss `make(*options)` of logits scale * row @ column' + bias, a mean over rows, and its metrics.

    Gradients reach the rows' first embedding, all columns, scale and bias; not the teacher's embedding, nor `options`.
    A tile has at most `tile` x `tile` logits. Raises ValueError if rows or a part of the columns do not divide by the
    number of devices.
    """
    devices = batch_shards()
    for name, part in (("rows", rows.embeddings[0]), *(("columns", part) for part in columns.embeddings)):
        if len(part) % devices:
            raise ValueError(f"{len(part)} {name} cannot be divided among {devices} devices")
    return _blockwise(make, tile, rows, columns, scale, bias, options)


def blockwise_contrastive(
    loss: type[Softmax] | type[Sigmoid], image: Float[Array, "b e"], text: Float[Array, "m e"],
    ids: PairIds, scale: Float[Array, ""], bias: Float[Array, ""], *, tile: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return `softmax_contrastive` or `sigmoid_contrastive` with the positives of `ids`, and the top-1 accuracy."""
    rows, columns = caption_keys(ids, len(image), len(text))
    return blockwise_loss(partial(loss, len(text) // len(image)), Anchors((image,), rows), Candidates(
        (text,), (columns,)), scale, bias, tile=tile)
