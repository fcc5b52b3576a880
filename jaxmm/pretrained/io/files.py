"""Read checkpoint files as tensors by name: safetensors, .npz, PyTorch old and new, TorchScript. Write safetensors.

The first bytes of a file say what it is, not its name. Nothing in a file is ever run, tensors are read on demand, and
every size is checked against the file before memory is allocated. PyTorch is not needed.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmm.atomic import atomic_file
from jaxmm.pretrained.io import torch as torch_files
from jaxmm.pretrained.io import zips
from jaxmm.pretrained.io.names import Weights, bare_names
from jaxmm.pretrained.io.tensors import (
    BFLOAT16,
    MAX_NAME,
    MAX_TENSORS,
    FileError,
    Tensor,
    Tensors,
    as_array,
    failure,
    read_bytes,
    shape_problem,
    short,
)

__all__ = ["FileError", "Tensor", "Tensors", "Weights", "file_metadata", "open_tensors", "open_weights",
           "write_safetensors"]

MAX_HEADER = 32 * 2**20
"""Longest safetensors header or index, in bytes; some 100 per tensor."""
POINTER = b"version https://git-lfs"
"""Beginning of the small file that git-lfs leaves in place of a large one."""
OTHERS = {b"GGUF": "a quantised GGUF file", b"\x89HDF": "a file of Keras (HDF5)", b"<": "a web page or XML",
          b"\x08": "an ONNX file", b"\x1f\x8b": "a gzip archive", b"7z": "an archive"}
"""Beginnings of files that are not read, and what they are."""

DTYPES = {  # in the library's order: the header lists wide types first, so that every tensor is aligned
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz), "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16), "BF16": BFLOAT16, "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32), "C64": np.dtype(np.complex64), "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64), "U64": np.dtype(np.uint64),
}


def open_tensors(path: Path, weights: Weights | None = None) -> Tensors:
    """Return the tensors in a file, or in the files that an index (`*.index.json`) names, by name.

    Prefixes of all names that wrappers add, such as `module.`, are removed; `weights` chooses between raw and averaged
    ones (see `names`). Raises `FileError`.
    """
    return open_weights(path, weights)[0]


def open_weights(path: Path, weights: Weights | None = None) -> tuple[Tensors, tuple[str, ...]]:
    """Return what `open_tensors` does, and notes on what was chosen."""
    path = Path(path)
    try:
        kind = _kind(path)
        tensors = _sharded(path) if kind == "index" else _single(path, kind)
        return bare_names(tensors, weights)
    except OSError as error:
        raise failure(path, [error.strerror or str(error)]) from None


def file_metadata(path: Path) -> dict[str, str]:
    """Return the `__metadata__` of a safetensors file, {} for others. Raises `FileError`."""
    path = Path(path)
    try:
        return _header(path)[1] if _kind(path) == "safetensors" else {}
    except OSError as error:
        raise failure(path, [error.strerror or str(error)]) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the same file as the safetensors library, with one tensor at a time in memory.

    It is written beside `path` and renamed when complete. Raises `FileError` for what the format cannot hold, and
    OSError.
    """
    path = Path(path)
    names = {dtype: name for name, dtype in DTYPES.items()}
    problems = [f"{short(name)} is {tensor.dtype}, which safetensors does not know"
                for name, tensor in tensors.items() if tensor.dtype not in names]
    problems += [f"no tensor can be called {short(name)}" for name in tensors
                 if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name)]
    metadata = dict(metadata or {})
    problems += [f"metadata {short(key)} is no text" for key, value in metadata.items()
                 if not (isinstance(key, str) and isinstance(value, str))]
    if problems:
        raise FileError(f"{path} cannot be written:\n  " + "\n  ".join(problems))
    rank = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    ordered = sorted(tensors.items(), key=lambda item: (-rank[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            array = tensor.read()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise FileError(f"{path} cannot be written: {name} is {array.dtype}{list(array.shape)}, "
                                f"not {tensor.dtype}{list(tensor.shape)} as announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is read


def is_pointer(path: Path) -> bool:
    """Return whether a file is what git-lfs leaves in place of it."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def _kind(path: Path) -> str:
    """Return the kind of a file, judged by its first bytes."""
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise failure(path, ["it is a folder; give a file in it" if path.is_dir() else "it is no ordinary file"])
    with path.open("rb") as file:
        head = file.read(max(16, len(POINTER)))
        length = file.seek(0, os.SEEK_END)
    if head[8:9] == b"{" and (head[:1] != b"{" or int.from_bytes(head[:8], "little") <= length):
        return "safetensors"
    for start, kind in ((b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"\x80", "pickle"), (b"{", "index")):
        if head.startswith(start):
            return kind
    if not head:
        raise failure(path, ["it is empty"])
    if head.startswith(POINTER):
        raise failure(path, ["it is a git-lfs pointer, not the file; `git lfs pull` in its repository fetches it"])
    what = next((f" as {kind} does" for start, kind in OTHERS.items() if head.lstrip().startswith(start)), "")
    raise failure(path, [f"it begins with {head[:16]!r}{what}; expected safetensors, .npz, a PyTorch file or an index "
                         "of shards"])


def _single(path: Path, kind: str) -> dict[str, Tensor]:
    if kind == "safetensors":
        return _safetensors(path)
    if kind == "pickle":
        return torch_files.open_legacy(path)
    files = zips.entries(path)
    if any(name.split("/")[-1] == "data.pkl" for name in files):
        return torch_files.open_zip(path, files)
    return zips.open_npz(path, files)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a repeated name."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{short(name)} is in it twice")
        result[name] = value
    return result


def _header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """Return a safetensors file's table, metadata and start of data; the library has checked the offsets."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise failure(path, [f"its header claims {size:,} bytes; at most {MAX_HEADER:,} are read"])
        text = file.read(size)
    if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:  # before Python has an object of each
        raise failure(path, [f"it holds {count:,} tensors; at most {MAX_TENSORS:,} are read"])
    try:
        with safe_open(path, "numpy"):
            pass
        table = json.loads(text, object_pairs_hook=_once)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise failure(path, [f"its header is wrong: {str(error)[:200]}"]) from None
    return table, table.pop("__metadata__", None) or {}, 8 + size


def _safetensors(path: Path) -> dict[str, Tensor]:
    table, _, data = _header(path)
    if len(table) > MAX_TENSORS:
        raise failure(path, [f"it holds {len(table):,} tensors; at most {MAX_TENSORS:,} are read"])
    tensors, problems = {}, []
    for name, info in table.items():
        dtype, shape, (start, end) = DTYPES.get(info["dtype"]), tuple(info["shape"]), info["data_offsets"]
        problem = (f"has {len(name):,} characters; at most {MAX_NAME} are read" if len(name) > MAX_NAME
                   else f"is {short(info['dtype'])}, which is not read" if dtype is None
                   else shape_problem(shape, dtype.itemsize))
        if not problem and end - start != math.prod(shape) * dtype.itemsize:
            problem = f"has {end - start:,} bytes for {info['dtype']}{list(shape)}"
        if problem:
            problems.append(f"{short(name)} {problem}")
            continue

        def read(start=data + start, count=end - start, dtype=dtype, shape=shape) -> np.ndarray:
            return as_array(read_bytes(path, start, count), dtype, shape)

        tensors[name] = Tensor(shape, dtype, read)
    if problems:
        raise failure(path, problems)
    return tensors


def _sharded(path: Path) -> dict[str, Tensor]:
    """Return the tensors that an index names, from the files beside it."""
    if path.stat().st_size > MAX_HEADER:
        raise failure(path, [f"it has {path.stat().st_size:,} bytes; at most {MAX_HEADER:,} of an index are read"])
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise failure(path, [f"it is no JSON: {str(error)[:200]}"]) from None
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise failure(path, ["it has no weight_map from tensors to files"])
    shards: dict[str, dict[str, Tensor]] = {}
    problems = []
    for shard in dict.fromkeys(names.values()):
        beside = path.parent / shard
        try:
            if shard in ("", ".", "..") or any(c in shard for c in "/\\:\0"):
                problems.append(f"shard {short(shard)} is not the name of a file beside it")
            elif (kind := _kind(beside)) == "index":
                problems.append(f"shard {short(shard)} is an index itself")
            else:
                shards[shard] = _single(beside, kind)
        except FileError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"shard {short(shard)}: {error.strerror or error}")
        except UnicodeEncodeError:
            problems.append(f"shard {short(shard)} is not the name of a file")
    tensors = {}
    for name, shard in names.items():
        if shard in shards and name not in shards[shard]:
            problems.append(f"{short(name)} is not in {shard}")
        elif shard in shards:
            tensors[name] = shards[shard][name]
    if problems:
        raise failure(path, problems)
    return tensors
