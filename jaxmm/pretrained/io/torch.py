"""Read files by `torch.save`, new and old, and by `torch.jit.save`, without PyTorch and without running their code.

The tensors of nested containers get the names joined with dots, as a `state_dict` has them. A TorchScript archive is
walked by its modules' attributes in the same way. From a training script's `{"state_dict": {...}, "epoch": ...}` only
the weights are read: the first dict with tensors that the top level has under one of `WRAPPERS`, and averaged ones,
whose names begin with their key (see `names`).
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.pretrained.io import pickles
from jaxmm.pretrained.io.names import AVERAGES
from jaxmm.pretrained.io.tensors import MAX_NAME, MAX_TENSORS, Tensor, as_array, failure, read_bytes, short
from jaxmm.pretrained.io.torch_globals import Module, Refused, View, kind_of
from jaxmm.pretrained.io.zips import Entry

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the weights, in order of preference."""
MAX_DEPTH = 64
"""Deepest nesting of containers and modules; a module that contains itself has no bottom."""
MAX_VISITS = 1_000_000
"""Most values visited; shared containers may be reached along very many paths."""
MAX_PREAMBLE = 100
"""Most steps of the pickles before the one with the tensors: two numbers and a small dict."""
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

Bytes = Callable[[int, int], np.ndarray]
"""Function that reads bytes of a storage, given start and count."""


def open_zip(path: Path, files: dict[str, Entry]) -> dict[str, Tensor]:
    """Return the tensors of a zip by `torch.save` or `torch.jit.save`, which has a data.pkl. Raises `FileError`."""
    pickled = [name for name in files if name.split("/")[-1] == "data.pkl" and name.count("/") <= 1]
    if len(pickled) != 1:
        raise failure(path, [f"it has {len(pickled)} data.pkl, not one"])
    folder = pickled[0].removesuffix("data.pkl")
    order = files.get(f"{folder}byteorder")
    if order is not None and order.read(min(order.size, 16)).tobytes() != b"little":
        raise failure(path, [f"its byte order is {short(order.read(min(order.size, 16)).tobytes())}, not little"])
    entry = files[pickled[0]]
    if entry.size > pickles.MAX_BYTES:
        raise failure(path, [f"{entry.name} has {entry.size:,} bytes; at most {pickles.MAX_BYTES:,} are read"])
    try:
        root, storages, _ = pickles.load(entry.read().tobytes(), 0, pickles.MAX_STEPS)
    except Refused as refused:
        raise failure(path, [f"{entry.name}: {refused}"]) from None
    problems, sources = [], {}
    for key, storage in storages.items():
        stored = files.get(f"{folder}data/{key}")
        if stored is None:
            problems.append(f"storage {short(key)} is missing")
        elif stored.deflated:
            problems.append(f"storage {short(key)} is compressed, which PyTorch never does")
        elif storage.nbytes > stored.size:
            problems.append(f"storage {short(key)} has {stored.size:,} bytes; {storage.nbytes:,} are claimed")
        else:
            sources[key] = stored.size, lambda start, count, stored=stored: stored.read(count, start)
    if problems:
        raise failure(path, problems)
    return _tensors(path, root, sources)


def open_legacy(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by `torch.save` before 1.6: five pickles, then storages. Raises `FileError`."""
    length = path.stat().st_size
    head = read_bytes(path, 0, min(length, pickles.MAX_BYTES)).tobytes()
    try:
        magic, _, end = pickles.load(head, 0, MAX_PREAMBLE)
        if magic != LEGACY_MAGIC:
            raise Refused("it is a pickle, but not one by torch.save")
        protocol, _, end = pickles.load(head, end, MAX_PREAMBLE)
        system, _, end = pickles.load(head, end, MAX_PREAMBLE)
        if protocol != LEGACY_PROTOCOL or type(system) is not dict:
            raise Refused(f"its protocol is {short(protocol)}, not {LEGACY_PROTOCOL}")
        if system.get("little_endian") is not True:
            raise Refused("its byte order is not little")
        root, storages, end = pickles.load(head, end, pickles.MAX_STEPS)
        keys, _, end = pickles.load(head, end, pickles.MAX_STEPS)
    except Refused as refused:
        cut = f" (of {length:,} bytes only {len(head):,} may be pickles)" if length > len(head) else ""
        raise failure(path, [f"{refused}{cut}"]) from None
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise failure(path, ["the storages it lists are not those of its tensors"])
    sources = {}
    with path.open("rb") as file:
        for key in keys:
            storage = storages[key]
            file.seek(end)
            count = file.read(8)
            start = end + 8
            end = start + storage.nbytes
            if len(count) < 8 or end > length:
                raise failure(path, [f"it is truncated: storage {short(key)} ends at byte {end:,} of {length:,}"])
            stored = struct.unpack("<q", count)[0] * (storage.dtype.itemsize if storage.dtype else 1)
            if stored != storage.nbytes:
                raise failure(path, [f"storage {short(key)} has {stored:,} bytes; {storage.nbytes:,} are claimed"])
            sources[key] = storage.nbytes, lambda at, count, start=start: read_bytes(path, start + at, count)
    return _tensors(path, root, sources)


def _tensors(path: Path, root: Any, sources: dict[str, tuple[int, Bytes]]) -> dict[str, Tensor]:
    """Return the tensors under `root`, by name."""
    walk = _Walk()
    try:
        views = {}
        for wrapper in WRAPPERS if type(root) is dict else ():
            if not views and type(root.get(wrapper)) is dict:
                views = walk.views(root[wrapper])
        for key in AVERAGES if type(root) is dict else ():
            if type(root.get(key)) in (dict, Module) and not any(name.startswith(AVERAGES) for name in views):
                views = views | {f"{key}.{name}": view for name, view in walk.views(root[key]).items()}
        views = views or walk.views(root)
        if not views:
            raise Refused(f"it holds no named tensors, only {kind_of(root)}")
        for name, view in views.items():
            if view.storage.nbytes > (size := sources[view.storage.key][0]):
                raise Refused(f"{short(name)} claims a storage of {view.storage.nbytes:,} bytes that has {size:,}")
    except Refused as refused:
        raise failure(path, [str(refused)]) from None
    return {name: Tensor(view.shape, view.dtype, _reader(view, sources[view.storage.key][1]))
            for name, view in views.items()}


class _Walk:
    """A search for views in nested dicts, lists, tuples and modules that refuses to take too long."""

    def __init__(self):
        self.by_name: dict[str, View] = {}
        self.visits = 0

    def views(self, root: Any) -> dict[str, View]:
        """Return every view under `root`, by the names on its path joined with dots."""
        self.by_name = {}
        self._enter(root, "", 0)
        return self.by_name

    def _enter(self, container: Any, name: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise Refused(f"its containers are nested more than {MAX_DEPTH} deep")
        inside = container.attributes if type(container) is Module else container
        if type(inside) not in (dict, list, tuple):
            return
        self.visits += 1 + len(inside)
        if self.visits > MAX_VISITS:
            raise Refused(f"its containers hold more than {MAX_VISITS:,} values")
        for key, value in inside.items() if type(inside) is dict else enumerate(inside):
            if type(value) in (View, Module, dict, list, tuple):
                # a hostile file may repeat a very long name very often
                inner = (f"{name}." if depth else "") + str(key)[:MAX_NAME + 1]
                if type(value) is View:
                    self._add(inner, value)
                else:
                    self._enter(value, inner[:MAX_NAME + 1], depth + 1)

    def _add(self, name: str, view: View) -> None:
        if len(name) > MAX_NAME:
            raise Refused(f"the name {short(name)} is too long; at most {MAX_NAME} characters are read")
        if name in self.by_name:
            raise Refused(f"two tensors are called {short(name)}")
        if len(self.by_name) >= MAX_TENSORS:
            raise Refused(f"it holds more than {MAX_TENSORS:,} tensors")
        self.by_name[name] = view


def _reader(view: View, read: Bytes) -> Callable[[], np.ndarray]:
    itemsize = view.dtype.itemsize

    def load() -> np.ndarray:
        if not view.span:
            return np.zeros(view.shape, view.dtype)
        data = as_array(read(view.offset * itemsize, view.span * itemsize), view.dtype, (view.span,))
        if _contiguous(view):
            return data.reshape(view.shape)
        strides = [step * itemsize for step in view.stride]
        # unlike as_strided, this refuses strides that leave the data, and takes every float8
        return np.array(np.ndarray(view.shape, view.dtype, data.view(np.uint8), strides=strides), order="C")

    return load


def _contiguous(view: View) -> bool:
    expected = 1
    for size, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
