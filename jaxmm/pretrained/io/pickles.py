"""PyTorch's pickles, read by a machine that knows tensors and containers and nothing else.

Nothing in a pickle is imported or called: a global is a name in `torch_globals.GLOBALS`, or it is refused. Python's
`pickle.Unpickler` with an allow-list does not suffice. A file of 300 bytes with nested tuples as a key keeps it hashing
for years, in C and deaf to Ctrl-C; ten bytes make it allocate GiB for its memo. Here every opcode costs about the same.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any

from jaxmm.pretrained.io.tensors import short
from jaxmm.pretrained.io.torch_globals import (
    GLOBALS,
    INERT,
    Global,
    Module,
    Refused,
    Storage,
    StorageKind,
    kind_of,
    update,
)

MAX_BYTES = 32 * 2**20
"""Longest pickle read. It holds names and shapes, not values: some 150 bytes per tensor."""
MAX_STEPS = 1_000_000
"""Most opcodes followed and items copied: about a second's work, and some 28,000 tensors of 35 opcodes each."""

MODULE_CLASSES = "__torch__"
"""The package of TorchScript's classes, which hold attributes."""


def load(data: bytes, start: int, most: int) -> tuple[Any, dict[str, Storage], int]:
    """Return the object in the pickle at `start` of `data`, the storages it names, and where it ends.

    Raises `Refused`, also for a pickle that takes more than `most` steps.
    """
    machine, stream, position = _Machine(most), io.BytesIO(data), start
    stream.seek(start)
    try:
        for code, argument, position in pickletools.genops(stream):
            machine.spend(1)
            if code.name == "INST":
                _find(*argument.split(" ", 1))
            if code.name not in _STEPS:
                raise Refused(f"its pickle uses the opcode {code.name} (byte {position}), which no tensor needs")
            _STEPS[code.name](machine, argument)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, AttributeError, UnicodeDecodeError, AssertionError):
        raise Refused(f"its pickle is truncated or damaged near byte {position}") from None
    return machine.stack.pop(), machine.storages, stream.tell()


class _Machine:
    """A pickle's stack, the stacks below its marks, and its memo."""

    def __init__(self, most: int):
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps, self.most = 0, most

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most:
            raise Refused(f"its pickle takes more than {self.most:,} steps")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not list:
            raise Refused(f"its pickle appends to {kind_of(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(target := self.stack[-1]) is not dict:
            raise Refused(f"its pickle sets items of {kind_of(target)}")
        update(target, items)

    def dictionary(self) -> None:
        items = self.pop_mark()
        self.push({})
        update(self.stack[-1], items)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError
        self.push(_find(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or function.call is None:
            raise Refused(f"its pickle calls {kind_of(function)}")
        if type(arguments) is not tuple:
            raise ValueError
        self.push(function.call(self.spend, arguments))

    def new(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if type(kind) is not Global or kind.new is None or arguments != ():
            raise Refused(f"its pickle makes an object of {kind_of(kind)}")
        self.push(kind.new())

    def build(self) -> None:
        """Set the attributes of a TorchScript module; ignore those of dicts and of inert objects."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is Module and type(state) is dict:
            if not all(type(name) is str for name in state):
                raise ValueError
            self.spend(len(state))
            target.attributes.update(state)
        elif type(target) not in (Module, dict) and target is not INERT:
            raise Refused(f"its pickle sets the state of {kind_of(target)}")

    def persistent(self) -> None:
        """Read a storage: ('storage', its class, key, device, elements); legacy files add None or a view's place."""
        match self.pop():
            case ("storage", Global(value=StorageKind(dtype)), str(key), str(), int(count), *rest):
                if count < 0 or count >= 2**63:
                    raise Refused(f"storage {short(key)} claims {short(count)} elements")
                if rest and rest != [None]:
                    raise Refused(f"storage {short(key)} is a view of another storage, which is not read")
                storage = Storage(key, dtype, count * (dtype.itemsize if dtype else 1))
                self.storages.setdefault(key, storage)
                self.push(storage)
            case other:
                raise Refused(f"its pickle refers to {kind_of(other)} outside of it that is no storage")

    def stop(self) -> None:
        if len(self.stack) != 1 or self.below:
            raise ValueError


def _find(module: str, name: str) -> Global:
    if module == MODULE_CLASSES or module.startswith(MODULE_CLASSES + "."):
        return Global(MODULE_CLASSES, new=Module)
    if f"{module}.{name}" not in GLOBALS:
        raise Refused(f"its pickle wants the global {short(f'{module}.{name}')}; only tensors and plain containers are "
                      "read")
    return GLOBALS[f"{module}.{name}"]


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None, "FRAME": lambda m, a: None, "STOP": lambda m, a: m.stop(),
    "MARK": lambda m, a: m.mark(), "POP": lambda m, a: m.pop(),
    "NONE": lambda m, a: m.push(None), "NEWTRUE": lambda m, a: m.push(True), "NEWFALSE": lambda m, a: m.push(False),
    **dict.fromkeys((
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.push),
    "EMPTY_TUPLE": lambda m, a: m.push(()), "TUPLE": lambda m, a: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1), "TUPLE2": lambda m, a: m.tuple_of(2), "TUPLE3": lambda m, a: m.tuple_of(3),
    "EMPTY_LIST": lambda m, a: m.push([]), "LIST": lambda m, a: m.push(m.pop_mark()),
    "APPEND": lambda m, a: m.append([m.pop()]), "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "EMPTY_DICT": lambda m, a: m.push({}), "DICT": lambda m, a: m.dictionary(),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]), "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "BINGET": lambda m, a: m.push(m.memo[a]), "LONG_BINGET": lambda m, a: m.push(m.memo[a]),
    "GLOBAL": lambda m, a: m.push(_find(*a.split(" ", 1))), "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.reduce(), "NEWOBJ": lambda m, a: m.new(), "BUILD": lambda m, a: m.build(),
    "BINPERSID": lambda m, a: m.persistent(),
}
