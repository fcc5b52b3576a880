"""Inert replacements for the globals that PyTorch's pickles name. None of them is the real one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmm.pretrained.io.tensors import shape_problem, short


class Refused(ValueError):
    """A pickle that is damaged or asks for something other than tensors. The message says for what."""


@dataclass(frozen=True)
class StorageKind:
    """A class of storages; bytes without a dtype if `dtype` is None."""

    dtype: np.dtype | None


@dataclass(frozen=True)
class Storage:
    """Bytes elsewhere in the file, by their key."""

    key: str
    dtype: np.dtype | None
    nbytes: int


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage. `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass(eq=False)
class Module:
    """Attributes of a TorchScript module; its code is ignored."""

    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inert:
    """An object that is no tensor."""


INERT = Inert()
Spend = Callable[[int], None]
"""Counts copied items, and refuses too many."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle. REDUCE calls `call` with a `Spend` and a tuple, NEWOBJ calls `new`."""

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None
    value: Any = None


def kind_of(value: Any) -> str:
    """Return the kind of `value`, for a message."""
    if type(value) is Global:
        return f"the global {value.name}"
    return "a whole number" if type(value) is int else f"a {type(value).__name__.lower()}"


def update(target: dict, items: list[Any]) -> None:
    """Add keys and values, which alternate in `items`. Raises ValueError or `Refused`."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        # other keys may take years to hash, or collide on purpose
        if not (type(key) is str or (type(key) is int and -2**63 <= key < 2**63)):
            raise Refused(f"its pickle has {kind_of(key)} as a key; only text and whole numbers are read")
        target[key] = value


def _take(arguments: tuple, fewest: int, most: int) -> tuple:
    if not fewest <= len(arguments) <= most:
        raise ValueError
    return arguments


def _view(storage: Any, offset: Any, shape: Any, stride: Any, dtype: np.dtype | None) -> View:
    """Return a view after checking that it lies inside its storage and holds no more than that."""
    if type(storage) is not Storage or dtype is None:
        raise Refused("a tensor lacks its storage or its dtype")
    if type(shape) not in (tuple, list) or type(stride) not in (tuple, list) or type(offset) is not int:
        raise ValueError
    if len(shape) != len(stride):
        raise Refused(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    problem = shape_problem(shape, dtype.itemsize)
    if not problem and not all(type(step) is int and 0 <= step < 2**63 for step in stride):
        problem = f"stride {short(tuple(stride))}"
    if problem or not 0 <= offset < 2**63:
        raise Refused(f"a tensor in storage {short(storage.key)} is none: {problem or f'offset {short(offset)}'}")
    view = View(storage, offset, tuple(shape), tuple(stride), dtype)
    numel = math.prod(shape)
    if numel and max(numel, offset + view.span) * dtype.itemsize > storage.nbytes:
        raise Refused(f"a tensor {short(view.shape)} with offset {short(offset)} and stride {short(view.stride)} does "
                      f"not fit in storage {short(storage.key)} of {storage.nbytes:,} bytes")
    return view


def _rebuild_v2(_: Spend, arguments: tuple) -> View:
    """Replace torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    storage, offset, shape, stride, *rest = _take(arguments, 4, 7)
    _plain(rest[2:])
    return _view(storage, offset, shape, stride, storage.dtype if type(storage) is Storage else None)


def _rebuild_v3(_: Spend, arguments: tuple) -> View:
    storage, offset, shape, stride, _grad, _hooks, dtype, *rest = _take(arguments, 7, 8)
    _plain(rest)
    return _view(storage, offset, shape, stride,
                 dtype.value if type(dtype) is Global and isinstance(dtype.value, np.dtype) else None)


def _plain(metadata: list[Any]) -> None:
    if metadata and metadata[0]:
        raise Refused("a tensor is a lazily conjugated or negated view, which is not read")


def _parameter(_: Spend, arguments: tuple) -> View:
    data = _take(arguments, 3, 4)[0]
    if type(data) is not View:
        raise Refused(f"a parameter holds {kind_of(data)}")
    return data


def _from_type(spend: Spend, arguments: tuple) -> View:
    """Rebuild a tensor with Python attributes from (function, class, its arguments, attributes)."""
    function, _, inner, _ = _take(arguments, 4, 4)
    rebuild = function.call if type(function) is Global else None
    if rebuild not in (_rebuild_v2, _rebuild_v3, _parameter) or type(inner) is not tuple:
        raise Refused(f"a tensor is made by {kind_of(function)}")
    return rebuild(spend, inner)


def _ordered(spend: Spend, arguments: tuple) -> dict:
    """Replace collections.OrderedDict() and, from Python 2, OrderedDict([[key, value], ...])."""
    result: dict = {}
    for pairs in _take(arguments, 0, 1):
        if type(pairs) is not list:
            raise ValueError
        spend(2 * len(pairs))
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise ValueError
            update(result, list(pair))
    return result


def _same(_: Spend, arguments: tuple) -> Any:
    """Return the argument of a TorchScript typed list or of torch.Size."""
    first = _take(arguments, 1, 2)[0]
    if type(first) not in (list, tuple, dict):
        raise ValueError
    return first


def _inert(_: Spend, arguments: tuple) -> Inert:
    return INERT


def _table() -> dict[str, Global]:
    dtypes = {name: np.dtype(name) for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool", "uint64", "uint32",
        "uint16", "uint8", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "float8_e8m0fnu")}
    storages = {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexFloat": "complex64", "ComplexDouble": "complex128"}
    lists = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    # kept by training scripts beside the weights
    inert = ("argparse.Namespace", "torch.device", "torch.serialization._get_layout", "_codecs.encode", "numpy.dtype",
             "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "collections.Counter",
             *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
             *(f"datetime.{name}" for name in ("datetime", "date", "timedelta", "timezone")))
    calls = {
        "collections.OrderedDict": _ordered, "torch.Size": _same,
        "torch._utils._rebuild_tensor": _rebuild_v2, "torch._utils._rebuild_tensor_v2": _rebuild_v2,
        "torch._utils._rebuild_tensor_v3": _rebuild_v3, "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch._utils._rebuild_parameter": _parameter, "torch._utils._rebuild_parameter_with_state": _parameter,
        **{f"torch.jit._pickle.{name}": _same for name in lists}, **dict.fromkeys(inert, _inert)}
    news = {"argparse.Namespace": lambda: INERT, "collections.OrderedDict": dict}
    values = {
        **{f"torch.{name}": dtype for name, dtype in dtypes.items()},
        **{f"{package}.{name}Storage": StorageKind(dtypes[kind])
           for name, kind in storages.items() for package in ("torch", "torch.cuda")},
        "torch.storage.UntypedStorage": StorageKind(None), "torch.Tensor": None, "torch.nn.parameter.Parameter": None}
    return {name: Global(name, calls.get(name), news.get(name), values.get(name)) for name in (*calls, *values)}


GLOBALS = _table()
"""Every global a pickle may name, except TorchScript's classes (`__torch__...`)."""
