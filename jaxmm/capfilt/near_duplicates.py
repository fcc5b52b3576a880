"""Find images that are nearly the same by the cosine of their embeddings, over all shards.

Images that are connected by a chain of such pairs are one group. Every image is compared with every other one, in
blocks: that suits up to about a million images.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BLOCK = 2048
"""Rows and columns of cosines that are in memory at a time."""


def group_images(embeddings: Float[np.ndarray, "n e"], similarity: float) -> Int[np.ndarray, " n"]:
    """Return the number of the group of each image: images with a cosine of at least `similarity` are in one group."""
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(length, 1e-12)
    pairs = [np.zeros((0, 2), np.int64)]
    for row in range(0, len(unit), BLOCK):
        for column in range(row, len(unit), BLOCK):
            near = np.argwhere(unit[row:row + BLOCK] @ unit[column:column + BLOCK].T >= similarity)
            pairs.append(near + np.array([row, column]))
    first, second = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(len(unit), len(unit)))
    return connected_components(graph, directed=False)[1]


def representatives(groups: Int[np.ndarray, " n"], preferred: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return for each image the first image of its group, a `preferred` one if there is one."""
    order = np.lexsort((np.arange(len(groups)), ~preferred, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return order[starts][groups]


def unpack(parts: Sequence[Sequence[bytes]]) -> Float[np.ndarray, "n e"]:
    """Return embeddings stored as bytes of float16, in fp32."""
    rows = [np.frombuffer(row, np.float16) for part in parts for row in part]
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 1), np.float32)
