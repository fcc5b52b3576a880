"""What a compiled program says of itself: XLA's cycle estimates and its collectives, loops counted.

XLA's text names a loop's body once, however often it runs; `cost_analysis` counts it once too. Here every computation
is counted as often as it is reached, trip counts taken from the loops' conditions.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? \{([^}]*)\}")
_OPERATION = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """A line of the text."""

    name: str
    opcode: str
    result: str
    """Type and shape, as the text has it."""
    rest: str
    """Operands and attributes."""

    @property
    def cycles(self) -> int:
        """XLA's estimate, of a fusion for all in it; 0 where it has none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0

    @property
    def operation(self) -> str:
        """Where in the traced program it comes from."""
        found = _OPERATION.search(self.rest)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices, all of a step together, as one device sees it."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, along which the devices lie that take part."""
    count: int
    """How often in a step."""
    bytes: int
    """Of the whole of what is exchanged: what is gathered, reduced, or sent."""

    def sent_bytes(self, mesh: Mapping[str, int]) -> float:
        """That a device sends, the usual way around a ring of those that take part."""
        n = math.prod(mesh[axis] for axis in self.axes)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share


@dataclass(frozen=True)
class Kernel:
    """A program of its own inside the program."""

    name: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    """Type and shape of each operand."""


@dataclass
class Program:
    """The text of a compiled program, by computations."""

    text: str
    @cached_property
    def computations(self) -> dict[str, list[Instruction]]:
        """Their instructions, by name; the entry's also under ENTRY."""
        found: dict[str, list[Instruction]] = {}
        here: list[Instruction] = []
        for line in self.text.splitlines():
            if head := _COMPUTATION.match(line):
                here = found[head[2]] = []
                if head[1]:
                    found["ENTRY"] = here
            elif named := _INSTRUCTION.match(line):
                here.append(_instruction(named[1], line[named.end():]))
        return found

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs: the constant that its condition compares with; None where there is none."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        names, constants = [loop.called("condition")], []
        while names:
            for each in self.computations.get(names.pop(), ()):
                names += _CALLED.findall(each.rest)
                if each.opcode == "constant" and each.result.startswith("s32[]"):
                    constants.append(int(re.match(r"-?\d+", each.rest)[0]))
        return max(constants, default=None)

    def walk(
        self, name: str = "ENTRY", times: int = 1, fused: bool = False
    ) -> Iterator[tuple[Instruction, int, bool]]:
        """Each instruction that is reached, how often in all, and whether it is inside a fusion.

        Of a conditional's branches all count: XLA cannot know either.
        """
        for each in self.computations.get(name, ()):
            yield each, times, fused
            if each.opcode == "while":
                yield from self.walk(each.called("body"), times * (self.trips(each) or 1), fused)
            elif each.opcode in ("fusion", "call", "async-start"):
                inside = each.called("calls") or each.called("to_apply")
                yield from self.walk(inside, times, fused or each.opcode == "fusion")
            elif each.opcode == "conditional":
                branches = _BRANCHES.search(each.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(each.rest)
                for branch in names:
                    yield from self.walk(branch, times, fused)

    @cached_property
    def kernels(self) -> dict[Kernel, int]:
        """Kernels that XLA did not write and has no estimate of, and how often they run."""
        found: dict[Kernel, int] = {}
        for each, times, _ in self.walk():
            if each.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in each.rest:
                shapes = re.search(r"operand_layout_constraints=\{(.*?)\}, (?:frontend|metadata|backend)", each.rest)
                inputs = tuple((kind, tuple(int(size) for size in sizes.split(",")))
                               for kind, sizes in _SHAPE.findall(shapes[1]))
                kernel = Kernel(each.name.split(".")[0], inputs)
                found[kernel] = found.get(kernel, 0) + times
        return found

    @cached_property
    def cycles(self) -> int:
        """XLA's estimate of a run, of all that is neither an exchange between devices nor a kernel."""
        return sum(each.cycles * times for each, times, fused in self.walk() if not fused)

    def costliest(self, depth: int = 6) -> dict[str, int]:
        """Cycles by where in the traced program they come from, the first `depth` parts of its name, largest first."""
        found: dict[str, int] = {}
        for each, times, fused in self.walk():
            if not fused and each.cycles:
                name = "/".join(each.operation.split("/")[:depth])
                found[name] = found.get(name, 0) + each.cycles * times
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """What devices exchange in a run, by kind and by axes of `mesh` (sizes by name, in order), largest first."""
        found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for each, times, _ in self.walk():
            kind = each.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [_size(*shape) for shape in _SHAPE.findall(each.result)]
            whole = sizes[-1] if each.opcode.endswith("-start") and kind != "all-reduce" else sum(sizes)
            axes = _axes(each.rest, mesh)
            if kind == "reduce-scatter":
                whole *= math.prod(mesh[axis] for axis in axes)
            total = found.setdefault((kind, axes), [0, 0])
            total[0] += times
            total[1] += round(whole) * times
        rows = [Collective(kind, axes, count, size) for (kind, axes), (count, size) in found.items()]
        return sorted(rows, key=lambda row: -row.bytes)


def _instruction(name: str, text: str) -> Instruction:
    """The parts of `text`, what follows an instruction's name."""
    close = 0
    if text.startswith("("):      # a tuple's type holds parentheses of layouts
        depth = 0
        for close, sign in enumerate(text):  # noqa: B007
            depth += (sign == "(") - (sign == ")")
            if not depth:
                break
    end = text.index(" ", close)
    opcode, _, rest = text[end + 1:].partition("(")
    return Instruction(name, opcode, text[:end], rest)


def _size(kind: str, dimensions: str) -> float:
    """Bytes of an array."""
    return BYTES.get(kind, 0) * math.prod(int(size) for size in dimensions.split(",") if size)


def _axes(text: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of `mesh` along which devices differ that exchange something."""
    sizes, different = tuple(mesh.values()), np.zeros(len(mesh), bool)
    for group in _groups(text, math.prod(sizes)):
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        different |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, yes in zip(mesh, different, strict=True) if yes)


def _groups(text: str, devices: int) -> list[list[int]]:
    """Devices that exchange something: all pairs, or the first of equal groups, in any of XLA's ways of writing."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        return [[int(device) for device in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    if named := _NAMED.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        grid, taking = order.reshape(tuple(sizes.values())), re.findall(r"'(\w+)'", named[3])
        return [grid[tuple(slice(None) if name in taking else 0 for name in sizes)].ravel().tolist()]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [[int(device) for device in listed[1].split(",")]]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return [_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist()]
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """The numbers that `[16,16]T(1,0)` stands for: counted in that shape, then transposed."""
    shape, turned = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(map(int, shape.split(",")))).reshape(tuple(map(int, shape.split(","))))
    return (numbers.transpose(tuple(map(int, turned.split(",")))) if turned else numbers).ravel()
