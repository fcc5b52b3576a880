"""Checkpoint formats as data: rows of (our path, their key, invertible operation), used in both directions.

Names and shapes are checked first: one error lists everything that is missing, left over or of another shape. Then
arrays are read and placed one by one.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmm.pretrained.io.files import FileError, Tensor, Tensors
from jaxmm.sharding import named_leaves

Shape = tuple[int, ...]
SHOWN = 20
"""Most problems of one kind that a message lists."""
COLUMNS = 16
"""Columns of a transposed matrix that are copied at a time: a cache line of fp32."""
COUNTED = 2**20
"""Values that are looked at together: they stay in the cache."""
READERS = 2
"""Most tensors that are read at a time; each takes memory beside the result."""


@dataclass(frozen=True)
class Op:
    """The layout of one of our arrays in a checkpoint."""

    shape: Callable[[Shape], Shape]
    """Their shape for ours."""
    read: Callable[[np.ndarray, Shape], np.ndarray]
    """Our array for theirs and our shape."""
    write: Callable[[np.ndarray], np.ndarray]
    """Their array for ours."""


SAME = Op(lambda ours: ours, lambda x, ours: x, lambda x: x)
FLAT = Op(lambda ours: (math.prod(ours),), lambda x, ours: x.reshape(ours), lambda x: x.reshape(-1))
"""A bias [h k] as a vector."""
CONV = Op(lambda ours: (ours[3], ours[2], ours[0], ours[1]), lambda x, ours: x.transpose(2, 3, 1, 0),
          lambda x: x.transpose(3, 2, 0, 1))
"""A kernel [p p c d] as torch's convolution [d c p p]."""
TRANSPOSED = Op(lambda ours: ours[::-1], lambda x, ours: x.T, lambda x: x.T)


def linear(inputs: int = 1) -> Op:
    """Return the layout of a kernel [*in *out] with `inputs` input dimensions as torch's matrix [out in]."""
    def sizes(ours):
        return math.prod(ours[:inputs]), math.prod(ours[inputs:])
    return Op(lambda ours: sizes(ours)[::-1], lambda x, ours: x.T.reshape(ours), lambda x: x.reshape(sizes(x.shape)).T)


def matrix(inputs: int = 1) -> Op:
    """Return the layout of a kernel [*in *out] with `inputs` input dimensions as a matrix [in out]."""
    def sizes(ours):
        return math.prod(ours[:inputs]), math.prod(ours[inputs:])
    return Op(sizes, lambda x, ours: x.reshape(ours), lambda x: x.reshape(sizes(x.shape)))


def lead(ones: int) -> Op:
    """Return the layout of an array after `ones` dimensions of size 1."""
    return Op(lambda ours: (1,) * ones + ours, lambda x, ours: x.reshape(ours),
              lambda x: x.reshape((1,) * ones + x.shape))


@dataclass(frozen=True)
class Row:
    """One of our arrays and its place in a checkpoint."""

    ours: str
    """Our path. If there is one key per layer, the array is stacked over layers."""
    theirs: str
    """Their key; `{}` stands for the number of a layer."""
    op: Op = SAME
    part: int = 0
    parts: int = 1
    """Number of arrays along an axis of theirs; ours is number `part` of them."""
    axis: int = 0
    """The axis that the parts lie along."""
    first: int = 0
    """Number of the first layer that has the key."""

    def keys(self, depth: int) -> list[str]:
        """Return their keys for `depth` layers, or their one key."""
        return [self.theirs.format(self.first + i) for i in range(depth)] if self.layered else [self.theirs]

    @property
    def layered(self) -> bool:
        """True if the checkpoint has one array per layer."""
        return "{}" in self.theirs


def read_params(
    tensors: Tensors, rows: Sequence[Row], like: Any, *, name: str, ignore: Iterable[str] = ()
) -> Any:
    """Read parameters with the shapes, dtypes and shardings, if any, of the `ShapeDtypeStruct`s `like`.

    `ignore` holds regular expressions of keys without use. Raises `FileError` with `name` and everything that is
    missing, left over, of another shape or not finite.
    """
    leaves = dict(named_leaves(like))
    _check(tensors, rows, leaves, name, [re.compile(pattern) for pattern in ignore])
    groups = defaultdict(list)
    for row in rows:
        groups[row.theirs].append(row)
    filled, infinite = {}, []

    def fill(group: list[Row]) -> None:
        """Fill the arrays that share tensors, so that each tensor is read once."""
        hosts = [_empty(leaves[row.ours]) for row in group]
        for layer, key in enumerate(group[0].keys(_depth(leaves, group[0]))):
            theirs = tensors[key].read()
            if count := count_not_finite(theirs):
                infinite.append(f"{key} ({', '.join(row.ours for row in group)}): {count:,} of {theirs.size:,} values")
            for row, host in zip(group, hosts, strict=True):
                target = host[layer, ...] if row.layered else host
                piece = np.split(theirs, row.parts, axis=row.axis)[row.part] if row.parts > 1 else theirs
                _copy(target, row.op.read(piece, target.shape))
            del theirs
        while hosts:
            host = hosts.pop()
            filled[group[len(hosts)].ours] = _place(host, leaves[group[len(hosts)].ours])
            del host

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fill, groups.values()))
    if infinite:
        raise FileError(f"{name} cannot be used:\n  " + _listed("with NaN or infinite values", infinite))
    paths = [path for path, _ in named_leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [filled[path] for path in paths])


def write_tensors(params: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the tensors that `read_params` would read, computed on demand.

    Raises `FileError` for parameters that no row covers.
    """
    leaves = dict(named_leaves(params))
    if left := sorted(set(leaves) - {row.ours for row in rows}):
        raise FileError(f"this format has no place for {', '.join(left[:SHOWN])}")
    groups = defaultdict(list)
    for row in rows:
        for layer, key in enumerate(row.keys(_depth(leaves, row))):
            groups[key].append((row, layer))

    def read(parts):
        arrays = []
        for row, layer in parts:
            ours = np.asarray(leaves[row.ours])
            arrays.append(row.op.write(ours[layer] if row.layered else ours))
        if parts[0][0].axis:
            return np.concatenate(arrays, axis=parts[0][0].axis)
        result = np.empty((sum(map(len, arrays)), *arrays[0].shape[1:]) if len(arrays) > 1 else arrays[0].shape,
                          arrays[0].dtype)
        start = 0
        for array in arrays:
            target = result[start:start + len(array)] if len(arrays) > 1 else result
            _copy(target, array)
            start += len(target) if len(arrays) > 1 else 0
        return result

    tensors = {}
    for key, parts in groups.items():
        parts.sort(key=lambda part: part[0].part)
        row, _ = parts[0]
        shape = _their_shape(row, leaves[row.ours].shape)
        tensors[key] = Tensor(shape, np.dtype(leaves[row.ours].dtype), partial(read, parts))
    return tensors


def _depth(leaves: Mapping[str, Any], row: Row) -> int:
    return leaves[row.ours].shape[0] if row.layered else 1


def _their_shape(row: Row, ours: Shape) -> Shape:
    shape = row.op.shape(tuple(ours[1:] if row.layered else ours))
    return (*shape[:row.axis], row.parts * shape[row.axis], *shape[row.axis + 1:]) if row.parts > 1 else shape


def _check(tensors, rows, leaves, name, ignore) -> None:
    uncovered = set(leaves) ^ {row.ours for row in rows}
    if uncovered:
        raise FileError(f"{name}: this format and the model do not agree on {', '.join(sorted(uncovered)[:SHOWN])}")
    missing, misshapen, integers, known = [], [], [], set()
    for row in rows:
        shape = _their_shape(row, leaves[row.ours].shape)
        for key in row.keys(_depth(leaves, row)):
            if key in known:
                continue
            known.add(key)
            if key not in tensors:
                missing.append(key)
            elif tensors[key].shape != shape:
                misshapen.append(f"{key} {list(tensors[key].shape)}, expected {list(shape)}")
            elif tensors[key].dtype.kind in "iubc":
                integers.append(f"{key} {tensors[key].dtype}")
    left = [key for key in tensors if key not in known and not any(pattern.search(key) for pattern in ignore)]
    problems = [_listed(kind, keys) for kind, keys in
                (("missing", missing), ("of another shape", misshapen), ("not floating-point: quantised?", integers),
                 ("left over", left)) if keys]
    if problems:
        raise FileError(f"{name} does not hold this model:\n  " + "\n  ".join(problems))


def count_not_finite(array: np.ndarray) -> int:
    """Return how many values are NaN or infinite."""
    flat = array.reshape(-1)
    finite = (np.count_nonzero(np.isfinite(flat[start:start + COUNTED])) for start in range(0, len(flat), COUNTED))
    return len(flat) - int(sum(finite))


def _listed(kind: str, keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {', '.join(sorted(keys)[:SHOWN])}{more}"


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy `source` into `target`, which is contiguous.

    A transposed matrix is copied a few columns at a time: numpy's copy of it misses the cache for every element.
    """
    if source.ndim > 1 and source.size > COLUMNS**2:
        for shape in ((len(source), -1), (-1, source.shape[-1])):
            try:
                flat = source.reshape(shape, copy=False)
            except ValueError:
                continue
            if flat.strides[0] == flat.itemsize < flat.strides[1]:
                target = target.reshape(flat.shape)
                for start in range(0, flat.shape[1], COLUMNS):
                    target[:, start:start + COLUMNS] = flat[:, start:start + COLUMNS]
                return
    target[...] = source


def _empty(like: Any) -> np.ndarray:
    """Return an array to fill, aligned so that a CPU device needs no copy of it."""
    dtype, align = np.dtype(like.dtype), 64
    count = math.prod(like.shape) * dtype.itemsize
    raw = np.empty(count + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start:start + count].view(dtype).reshape(like.shape)


def _place(host: np.ndarray, like: Any) -> jax.Array:
    where = getattr(like, "sharding", None)
    if where is None or len(where.device_set) == 1:
        return jax.device_put(host, where, may_alias=True)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
