"""Lazy tensors, whose shapes are known at once and whose values are read one by one, and the limits on files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

MAX_TENSORS = 100_000
"""Most tensors in a file. The largest published towers have some 2,000, their optimizers three times that."""
MAX_NAME = 512
"""Longest name of a tensor, in characters. Nested containers could otherwise multiply long names without bound."""
MAX_DIMS = 32
"""Most dimensions of a tensor; numpy itself stops at 64."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class FileError(ValueError):
    """A checkpoint file that cannot be read. The message names the file and all its problems."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read()` returns a new, writable, C-contiguous array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Tensor]


def failure(path: Path, problems: Sequence[str]) -> FileError:
    """Return the error that lists up to ten problems of `path`."""
    if len(problems) == 1:
        return FileError(f"{path} cannot be read: {problems[0]}")
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return FileError(f"{path} cannot be read:\n  " + "\n  ".join(problems[:10]) + more)


def short(value: object, limit: int = 100) -> str:
    """Shorten a text, number or tuple of numbers from a file for a message; show the type of others."""
    if isinstance(value, str | bytes):
        text = repr(value[:limit])
    elif isinstance(value, tuple):
        text = f"({', '.join(repr(item) if type(item) is int else type(item).__name__ for item in value[:MAX_DIMS])})"
    else:
        text = repr(value) if isinstance(value, int) else type(value).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def shape_problem(shape: Sequence, itemsize: int) -> str | None:
    """Return the reason why numpy cannot make an array of this shape, or None."""
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions; at most {MAX_DIMS} are read"
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        return f"its shape {short(tuple(shape))} is not one"
    if math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
        return f"its shape {short(tuple(shape))} overflows"
    return None


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Read `count` bytes from `offset` on. Mapped pages would count as this process's memory, so nothing is mapped."""
    try:
        data = np.fromfile(path, np.uint8, count, offset=offset)
    except OSError as error:
        raise failure(path, [f"{error.strerror or error}"]) from None
    if data.size != count:
        raise failure(path, [f"it ends {count - data.size:,} bytes early; it has changed since it was opened"])
    return data


def as_array(data: np.ndarray, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """View bytes as the array they hold. A bool that is neither 0 nor 1 is true."""
    return (data != 0 if dtype.kind == "b" else data.view(dtype)).reshape(shape)
