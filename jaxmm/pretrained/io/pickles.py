"""Pickles as PyTorch writes them, read by a machine that knows tensors, containers and nothing else.

Nothing in a pickle is ever imported or called. A global is a name in the table of `stand_ins`, or it is refused.
Python's own unpickler, even with `find_class` shut, would still let a file of some hundred bytes hash nested tuples
for years or grow its memo to many GiB; here every opcode costs about the same.
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
"""Longest pickle read. It holds names and shapes, not values: some 150 bytes a tensor."""
MAX_STEPS = 1_000_000
"""Most opcodes followed and items copied: about a second's work, and some 28,000 tensors of 35 opcodes each."""

MODULE_CLASSES = "__torch__"
"""The package of TorchScript's classes: each stands for a bag of attributes."""


def load(data: bytes, start: int, most: int) -> tuple[Any, dict[str, Storage], int]:
    """The object that the pickle at `start` of `data` holds, the storages it names, and where it ends.

    Raises `Refused`, also when it takes more than `most` steps.
    """
    machine = _Machine(most)
    stream = io.BytesIO(data)
    stream.seek(start)
    position = start
    try:
        for code, argument, position in pickletools.genops(stream):
            machine.spend(1)
            step = _STEPS.get(code.name)
            if step is None:
                if code.name == "INST":
                    raise Refused(f"its pickle wants the global {short(argument.replace(' ', '.'))}; only tensors and "
                                  "plain containers are read")
                raise Refused(f"its pickle uses the opcode {code.name} (byte {position}), which no tensor needs")
            step(machine, argument)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, AttributeError, UnicodeDecodeError, AssertionError):
        raise Refused(f"its pickle is truncated or damaged near byte {position}") from None
    return machine.result, machine.storages, stream.tell()


class _Machine:
    """A pickle's stack, marks and memo."""

    def __init__(self, most: int):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps, self.most = 0, most
        self.result: Any = None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise ValueError
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most:
            raise Refused(f"its pickle takes more than {self.most:,} steps")

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def append(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refused(f"its pickle appends to {kind_of(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict:
            raise Refused(f"its pickle sets items of {kind_of(target)}")
        update(target, items)

    def dictionary(self) -> None:
        target: dict = {}
        update(target, self.pop_mark())
        self.push(target)

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
        """Sets an object's state: what a TorchScript module holds is kept, notes on a dict or an inert are not."""
        state, target = self.pop(), self.top()
        if type(target) is Module:
            if type(state) is dict:
                if not all(type(name) is str for name in state):
                    raise ValueError
                self.spend(len(state))
                target.attributes.update(state)
        elif type(target) is not dict and target is not INERT:
            raise Refused(f"its pickle sets the state of {kind_of(target)}")

    def persistent(self) -> None:
        """A storage: ('storage', its class, key, device, elements), and for legacy files None or a view of another."""
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
        self.result = self.pop()
        if self.stack or self.marks:
            raise ValueError


def _find(module: str, name: str) -> Global:
    if module == MODULE_CLASSES or module.startswith(MODULE_CLASSES + "."):
        return Global(MODULE_CLASSES, new=Module)
    found = GLOBALS.get(f"{module}.{name}")
    if found is None:
        raise Refused(f"its pickle wants the global {short(f'{module}.{name}')}; only tensors and plain containers are "
                      "read")
    return found


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value)


def _argument(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, a: None, "FRAME": lambda m, a: None, "STOP": lambda m, a: m.stop(),
    "MARK": lambda m, a: m.marks.append(len(m.stack)), "POP": lambda m, a: m.pop(),
    "NONE": _constant(None), "NEWTRUE": _constant(True), "NEWFALSE": _constant(False),
    **{name: _argument for name in (
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")},
    "EMPTY_TUPLE": _constant(()), "TUPLE": lambda m, a: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1), "TUPLE2": lambda m, a: m.tuple_of(2), "TUPLE3": lambda m, a: m.tuple_of(3),
    "EMPTY_LIST": lambda m, a: m.push([]), "LIST": lambda m, a: m.push(m.pop_mark()),
    "APPEND": lambda m, a: m.append([m.pop()]), "APPENDS": lambda m, a: m.append(m.pop_mark()),
    "EMPTY_DICT": lambda m, a: m.push({}), "DICT": lambda m, a: m.dictionary(),
    "SETITEM": lambda m, a: m.set_items([m.pop(), m.pop()][::-1]), "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "BINPUT": lambda m, a: m.put(a), "LONG_BINPUT": lambda m, a: m.put(a), "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "BINGET": lambda m, a: m.push(m.memo[a]), "LONG_BINGET": lambda m, a: m.push(m.memo[a]),
    "GLOBAL": lambda m, a: m.push(_find(*a.split(" ", 1))), "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.reduce(), "NEWOBJ": lambda m, a: m.new(), "BUILD": lambda m, a: m.build(),
    "BINPERSID": lambda m, a: m.persistent(),
}
