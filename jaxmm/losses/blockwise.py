"""Contrastive losses in blocks that rotate around the mesh: no device holds all logits, nor all embeddings.

Each device keeps its rows. The columns go round: a device compares its rows with the block that it has, tile by tile,
and passes the block on, with what it found out about those columns, until every block has come home. The gradient
goes round a second time and computes the logits again, so that nothing of the first round is kept but a few numbers a
row (the tiles of Inf-CL, Cheng et al. 2024, and the exchange of SigLIP, Zhai et al. 2023, section 3.3). Values and
gradients are those of `jaxmm.losses.contrastive`; memory is that of a few copies of a device's own embeddings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmm.losses.contrastive import Ids
from jaxmm.sharding import BATCH, batch_devices

Keys = Int[Array, "_ k 2"]
"""What pairs are recognised by: a row and a column with one key in common, at the same place, belong together."""
NOT_IN_BATCH = -1
"""That of a column which is no example of the batch."""


def pair_keys(ids: tuple[Ids | None, ...], places: Int[Array, "n"]) -> Keys:
    """Keys of examples: their places in the batch, and those of `ids` that there are."""
    place = jnp.stack([places, jnp.zeros_like(places)], axis=1)
    return jnp.stack([place, *(each for each in ids if each is not None)], axis=1)


def _positive_mask(rows: Keys, columns: Keys) -> Bool[Array, "r c"]:
    return (rows[:, None] == columns[None]).all(axis=-1).any(axis=-1)


class BlockLoss(Protocol):
    """A loss, told tile by tile. `logits` are a tuple of tiles [r c], one for each kind of row embedding.

    States and residuals are trees of vectors, a number for each row or column.
    """

    def start(self, rows: int, columns: int) -> tuple[Any, Any]:
        """The states of rows and of columns before the first tile."""

    def update(self, row: Any, column: Any, logits: tuple[Array, ...], positive: Array) -> tuple[Any, Any]:
        """The states of a tile's rows and columns with the tile in them."""

    def finalize(self, row: Any, column: Any) -> tuple[Array, dict[str, Array], Any, Any]:
        """Of all rows and columns of a device: loss, to be added up and divided by all rows; numbers a row that are
        to be averaged, by name; and what the backward pass needs of rows and columns."""

    def grad(self, row: Any, column: Any, logits: tuple[Array, ...], positive: Array) -> Array:
        """The derivative of the sum of losses by the first of `logits`."""


class Sums(NamedTuple):
    """Of the logits of each row (or column): what a cross-entropy needs of them."""

    highest: Float[Array, "n"]
    total: Float[Array, "n"]
    """Of the exponentials, less the highest."""
    positive: Float[Array, "n"]
    """Of the logits of positives."""
    count: Float[Array, "n"]
    """Of positives."""

    @classmethod
    def empty(cls, n: int) -> "Sums":
        """Of no logits."""
        return cls(jnp.full(n, -jnp.inf), *jnp.zeros((3, n)))

    def add(self, logits: Float[Array, "r c"], positive: Bool[Array, "r c"], axis: int) -> "Sums":
        """With a tile; `axis` is the one that is summed over."""
        highest = jnp.maximum(self.highest, logits.max(axis=axis))
        total = jnp.exp(logits - jnp.expand_dims(highest, axis)).sum(axis=axis)
        return Sums(highest, self.total * jnp.exp(self.highest - highest) + total,
                    self.positive + jnp.where(positive, logits, 0.0).sum(axis=axis),
                    self.count + positive.sum(axis=axis))

    @property
    def log_total(self) -> Float[Array, "n"]:
        """Logarithm of the sum of the exponentials."""
        return self.highest + jnp.log(self.total)


def _nearest(row: Array, logits: Array, positive: Array) -> Array:
    """The largest logit of a positive, so far."""
    return jnp.maximum(row, jnp.where(positive, logits, -jnp.inf).max(axis=1))


class Softmax:
    """`softmax_contrastive`: both directions' cross-entropies."""

    def start(self, rows, columns):
        """Empty sums."""
        return (Sums.empty(rows), jnp.full(rows, -jnp.inf)), Sums.empty(columns)

    def update(self, row, column, logits, positive):
        """Sums both ways."""
        [s] = logits
        sums, nearest = row
        return (sums.add(s, positive, 1), _nearest(nearest, s, positive)), column.add(s, positive, 0)

    def finalize(self, row, column):
        """Log-sums less the mean of the positives' logits."""
        sums, nearest = row
        loss = sum((each.log_total - each.positive / each.count).sum() for each in (sums, column)) / 2
        right = {"accuracy": (nearest >= sums.highest).astype(jnp.float32)}
        return loss, right, *((each.log_total, each.count) for each in (sums, column))

    def grad(self, row, column, logits, positive):
        """Probabilities less targets, both ways."""
        [s] = logits
        ways = (row[0][:, None], row[1][:, None]), (column[0][None], column[1][None])
        return sum(jnp.exp(s - log_total) - positive / count for log_total, count in ways) / 2


class Sigmoid:
    """`sigmoid_contrastive`: every pair by itself."""

    def start(self, rows, columns):
        """Of rows the loss, the largest logit, and the largest of a positive."""
        return (jnp.zeros(rows), *[jnp.full(rows, -jnp.inf)] * 2), ()

    def update(self, row, column, logits, positive):
        """Adds the tile's losses."""
        [s] = logits
        loss, highest, nearest = row
        loss = loss - jax.nn.log_sigmoid(jnp.where(positive, s, -s)).sum(axis=1)
        return (loss, jnp.maximum(highest, s.max(axis=1)), _nearest(nearest, s, positive)), column

    def finalize(self, row, column):
        """Nothing is needed later."""
        loss, highest, nearest = row
        return loss.sum(), {"accuracy": (nearest >= highest).astype(jnp.float32)}, (), ()

    def grad(self, row, column, logits, positive):
        """Minus the sign times the chance that the pair is taken for what it is not."""
        [s] = logits
        return jnp.where(positive, -jax.nn.sigmoid(-s), jax.nn.sigmoid(s))


class Distilled:
    """`soft_contrastive` with `distilled_targets`: rows only, a second logit for the teacher's opinion.

    What rows hold is student and teacher; columns learn nothing.
    """

    def __init__(self, alpha: Float[Array, ""]):
        self.alpha = alpha

    def start(self, rows, columns):
        """Sums of the student, and of the teacher with the student's logits weighted by them."""
        return (Sums.empty(rows), jnp.full(rows, -jnp.inf), *jnp.zeros((2, rows))), ()

    def update(self, row, column, logits, positive):
        """Adds the tile."""
        s, told = logits
        sums, before, total, weighted = row
        highest = jnp.maximum(before, told.max(axis=1))
        shrunk, weights = jnp.exp(before - highest), jnp.exp(told - highest[:, None])
        return (sums.add(s, positive, 1), highest, total * shrunk + weights.sum(axis=1),
                weighted * shrunk + (weights * s).sum(axis=1)), column

    def finalize(self, row, column):
        """Log-sums less the mean of the logits under the targets."""
        sums, highest, total, weighted = row
        wanted = self.alpha * weighted / total + (1 - self.alpha) * sums.positive / sums.count
        return (sums.log_total - wanted).sum(), {}, (sums.log_total, sums.count, highest + jnp.log(total)), ()

    def grad(self, row, column, logits, positive):
        """Probabilities less targets."""
        s, told = logits
        log_total, count, told_total = (each[:, None] for each in row)
        target = self.alpha * jnp.exp(told - told_total) + (1 - self.alpha) * positive / count
        return jnp.exp(s - log_total) - target


class Anchors(NamedTuple):
    """What stays: one or two embeddings for each row, and keys."""

    embeddings: tuple[Float[Array, "r e"], ...]
    """The first learns."""
    keys: Keys


class Candidates(NamedTuple):
    """What goes round: pieces that every device has its share of, one after the other."""

    embeddings: tuple[Float[Array, "_ e"], ...]
    keys: tuple[Keys, ...]


def _tile(size: int, largest: int) -> int:
    """The largest divisor of `size` that is not above `largest`."""
    return next(tile for tile in range(min(size, largest), 0, -1) if size % tile == 0)


def _each_tile(update: Callable, tile: int, rows: Any, columns: Any, row_state: Any, column_state: Any):
    """`update(rows, columns, row_state, column_state)` of all tiles, whose states are put in the places of the old."""
    sizes = [len(jax.tree.leaves(tree)[0]) for tree in (rows, columns)]
    heights = [_tile(size, tile) for size in sizes]
    across = sizes[1] // heights[1]

    def body(i, states):
        starts = i // across * heights[0], i % across * heights[1]

        def cut(tree, which):
            return jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, starts[which], heights[which]), tree)

        def put(tree, part, which):
            return jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, starts[which], 0), tree, part)

        new = update(cut(rows, 0), cut(columns, 1), cut(states[0], 0), cut(states[1], 1))
        return put(states[0], new[0], 0), put(states[1], new[1], 1)

    count = sizes[0] // heights[0] * across
    if count == 1:
        return update(rows, columns, row_state, column_state)
    return jax.lax.fori_loop(0, count, body, (row_state, column_state))


def _ring(update: Callable, devices: int, columns: Any, row_state: Any, column_state: Any):
    """`update(columns, row_state, column_state)` with each device's block of columns in turn; all come home."""
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def step(_, carry):
        columns, row_state, column_state = carry
        coming = jax.lax.ppermute(columns, BATCH, onward)   # while these are visited
        row_state, column_state = update(columns, row_state, column_state)
        return coming, row_state, jax.lax.ppermute(column_state, BATCH, onward)

    if devices == 1:
        return update(columns, row_state, column_state)
    return jax.lax.fori_loop(0, devices, step, (columns, row_state, column_state))[1:]


def _logits(rows: Anchors, columns: Candidates, scale: Array, bias: Array) -> tuple[Array, ...]:
    return tuple(scale * x @ columns.embeddings[0].T + bias for x in rows.embeddings)


def _joined(columns: Candidates) -> Candidates:
    """A device's own pieces as one block."""
    return Candidates((jnp.concatenate(columns.embeddings),), (jnp.concatenate(columns.keys),))


def _forward_here(make, tile, devices, rows, columns, scale, bias, options):
    """A device's share of the loss."""
    kind, block = make(*options), _joined(columns)

    def update(block, row_state, column_state):
        return _each_tile(lambda r, c, *states: kind.update(*states, _logits(r, c, scale, bias),
                                                           _positive_mask(r.keys, c.keys[0])),
                          tile, rows, block, row_state, column_state)

    row, column = _ring(update, devices, block, *kind.start(len(rows.keys), len(block.keys[0])))
    loss, means, row, column = kind.finalize(row, column)
    count = len(rows.keys) * devices
    summed = jax.tree.map(lambda x: jax.lax.psum(x, BATCH) if devices > 1 else x, (loss, {
        name: each.sum() for name, each in means.items()}))
    return *jax.tree.map(lambda x: x / count, summed), row, column


def _backward_here(make, tile, devices, rows, columns, scale, bias, options, row, column, gradient):
    """A device's share of the gradients: of its rows, of its own columns, and of scale and bias."""
    kind, block = make(*options), _joined(columns)
    factor = gradient / (len(rows.keys) * devices)

    def update(known, row_state, column_state):
        def tile_of(r, c, row_state, column_state):
            (r, row), (c, column) = r, c
            with jax.named_scope("recomputed"):
                logits = _logits(r, c, scale, bias)
            grad = factor * kind.grad(row, column, logits, _positive_mask(r.keys, c.keys[0]))
            d_row, d_bias = row_state
            d_row = d_row + scale * grad @ c.embeddings[0]
            return (d_row, d_bias + grad.sum(axis=1)), column_state + scale * grad.T @ r.embeddings[0]
        return _each_tile(tile_of, tile, (rows, row), known, row_state, column_state)

    x, whole = rows.embeddings[0], block.embeddings[0]
    (d_rows, d_bias), d_columns = _ring(update, devices, (block, column),
                                          (jnp.zeros_like(x), jnp.zeros(len(x))), jnp.zeros_like(whole))
    d_scale = (d_rows * x).sum() / scale
    d_scale, d_bias = (jax.lax.psum(each, BATCH) if devices > 1 else each for each in (d_scale, d_bias.sum()))
    ends = [sum(len(each) for each in columns.embeddings[:i + 1]) for i in range(len(columns.embeddings) - 1)]
    return d_rows, tuple(jnp.split(d_columns, ends)), d_scale, d_bias


def _spread(function: Callable, inputs: tuple[bool, ...], outputs: tuple[bool, ...]) -> Callable:
    """`function(devices, ...)` on every device's share; True marks what is spread, False what all devices have.

    Outside a mesh, or where the batch lies whole on one device, all is that device's.
    """
    devices = batch_devices()
    here = partial(function, devices)
    if devices == 1:
        return here
    spread = {True: PartitionSpec(BATCH), False: PartitionSpec()}
    return jax.shard_map(here, in_specs=tuple(spread[each] for each in inputs),
                         out_specs=tuple(spread[each] for each in outputs), check_vma=False)


_INPUTS = (True, True, False, False, False)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _compared(make, tile, rows, columns, scale, bias, options):
    return _compared_forward(make, tile, rows, columns, scale, bias, options)[0]


def _compared_forward(make, tile, rows, columns, scale, bias, options):
    run = _spread(partial(_forward_here, make, tile), _INPUTS, (False, False, True, True))
    loss, means, row, column = run(rows, columns, scale, bias, options)
    return (loss, means), (rows, columns, scale, bias, options, row, column)


def _compared_backward(make, tile, kept, gradient):
    run = _spread(partial(_backward_here, make, tile), (*_INPUTS, True, True, False), (True, True, False, False))
    d_rows, d_columns, d_scale, d_bias = run(*kept, gradient[0])
    rest = tuple(jnp.zeros_like(x) for x in kept[0].embeddings[1:])
    return (Anchors((d_rows, *rest), None), Candidates(d_columns, (None,) * len(d_columns)), d_scale, d_bias,
            jax.tree.map(jnp.zeros_like, kept[4]))


_compared.defvjp(_compared_forward, _compared_backward)


def blockwise_loss(
    make: Callable[..., BlockLoss], rows: Anchors, columns: Candidates, scale: Float[Array, ""], bias: Float[Array, ""],
    *options: Float[Array, ""], tile: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of kind `make(*options)` of scale * row @ column' + bias, a mean over rows, and means of what is told.

    Gradients reach the first embedding of the rows, all columns, scale and bias; not the teacher's, nor `options`.
    A tile has at most `tile` x `tile` logits. Raises ValueError where a piece of rows or columns does not divide into
    the devices.
    """
    devices = batch_devices()
    for name, piece in (("rows", rows.embeddings[0]), *(("columns", each) for each in columns.embeddings)):
        if len(piece) % devices:
            raise ValueError(f"{len(piece)} {name} cannot be divided among {devices} devices")
    return _compared(make, tile, rows, columns, scale, bias, options)


def blockwise_contrastive(
    kind: type[Softmax] | type[Sigmoid], image: Float[Array, "b e"], text: Float[Array, "b e"],
    ids: tuple[Ids | None, ...], scale: Float[Array, ""], bias: Float[Array, ""], *, tile: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`softmax_contrastive` or `sigmoid_contrastive` with the positives of `ids`, and the accuracy of the nearest."""
    keys = pair_keys(ids, jnp.arange(len(image)))
    return blockwise_loss(kind, Anchors((image,), keys), Candidates((text,), (keys,)), scale, bias, tile=tile)
