"""Read a compiled program's HLO text: XLA's cycle estimates and the collectives, including every iteration of loops.

The text contains a loop's body once, however often it runs; `cost_analysis` counts it once too. Here every computation
counts as often as it runs, with trip counts from the loops' conditions.
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


@dataclass(frozen=True)
class Instruction:
    """One line of the text."""

    name: str
    opcode: str
    result: str
    """Type and shape, as in the text."""
    rest: str
    """Operands and attributes."""

    @property
    def cycles(self) -> int:
        """XLA's estimate, for a fusion that of everything in it; 0 if there is none."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match else 0

    def called(self, key: str) -> str | None:
        """Return the name of the computation in attribute `key`."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and along the same axes in a step, per device."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes of the participating devices."""
    count: int
    """Number of collectives per step."""
    bytes: int
    """Size of the full arrays that are gathered, reduced or sent."""

    def sent_bytes(self, mesh: Mapping[str, int]) -> float:
        """Return the bytes that each device sends in a ring of the participating devices."""
        n = math.prod(mesh[axis] for axis in self.axes)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.bytes * share


@dataclass(frozen=True)
class Kernel:
    """A custom kernel in the program."""

    name: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    """Type and shape of each operand."""


@dataclass
class Program:
    """The text of a compiled program, by computation."""

    text: str

    @cached_property
    def computations(self) -> dict[str, list[Instruction]]:
        """Instructions of each computation by name; the entry's also under ENTRY."""
        computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in self.text.splitlines():
            if head := _COMPUTATION.match(line):
                current = computations[head[2]] = []
                if head[1]:
                    computations["ENTRY"] = current
            elif named := _INSTRUCTION.match(line):
                current.append(_parse_instruction(named[1], line[named.end():]))
        return computations

    def trip_count(self, loop: Instruction) -> int | None:
        """Return the iterations of a `while`: the constant in its condition; None if there is no constant."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        names, constants = [loop.called("condition")], []
        while names:
            for instruction in self.computations.get(names.pop(), ()):
                names += _CALLED.findall(instruction.rest)
                if instruction.opcode == "constant" and instruction.result.startswith("s32[]"):
                    constants.append(int(re.match(r"-?\d+", instruction.rest)[0]))
        return max(constants, default=None)

    def walk(
        self, name: str = "ENTRY", times: int = 1, fused: bool = False
    ) -> Iterator[tuple[Instruction, int, bool]]:
        """Yield each instruction that runs, how often it runs in all, and whether it is inside a fusion.

        All branches of a conditional count, because XLA does not know which one runs.
        """
        for instruction in self.computations.get(name, ()):
            yield instruction, times, fused
            if instruction.opcode == "while":
                yield from self.walk(instruction.called("body"), times * (self.trip_count(instruction) or 1), fused)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                callee = instruction.called("calls") or instruction.called("to_apply")
                yield from self.walk(callee, times, fused or instruction.opcode == "fusion")
            elif instruction.opcode == "conditional":
                branches = _BRANCHES.search(instruction.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(instruction.rest)
                for branch in names:
                    yield from self.walk(branch, times, fused)

    @cached_property
    def kernels(self) -> dict[Kernel, int]:
        """Custom TPU kernels, of which XLA has no estimate, and how often each runs."""
        counts: dict[Kernel, int] = {}
        for instruction, times, _ in self.walk():
            rest = instruction.rest
            if instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in rest:
                shapes = re.search(r"operand_layout_constraints=\{(.*?)\}, (?:frontend|metadata|backend)", rest)
                inputs = tuple((kind, tuple(int(size) for size in sizes.split(",")))
                               for kind, sizes in _SHAPE.findall(shapes[1]))
                kernel = Kernel(instruction.name.split(".")[0], inputs)
                counts[kernel] = counts.get(kernel, 0) + times
        return counts

    @cached_property
    def cycles(self) -> int:
        """XLA's estimate of one run, without collectives and custom kernels."""
        return sum(instruction.cycles * times for instruction, times, fused in self.walk() if not fused)

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """List the collectives of one run by kind and by axes of `mesh` (sizes by name, in order), largest first."""
        totals: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for instruction, times, _ in self.walk():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sizes = [_size(*shape) for shape in _SHAPE.findall(instruction.result)]
            size = sizes[-1] if instruction.opcode.endswith("-start") and kind != "all-reduce" else sum(sizes)
            axes = _axes(instruction.rest, mesh)
            if kind == "reduce-scatter":
                size *= math.prod(mesh[axis] for axis in axes)
            total = totals.setdefault((kind, axes), [0, 0])
            total[0] += times
            total[1] += round(size) * times
        rows = [Collective(kind, axes, count, size) for (kind, axes), (count, size) in totals.items()]
        return sorted(rows, key=lambda row: -row.bytes)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parse `text`, the part of a line after the instruction's name."""
    close = 0
    if text.startswith("("):      # a tuple's type contains the parentheses of layouts
        depth = 0
        for close, sign in enumerate(text):  # noqa: B007
            depth += (sign == "(") - (sign == ")")
            if not depth:
                break
    end = text.index(" ", close)
    opcode, _, rest = text[end + 1:].partition("(")
    return Instruction(name, opcode, text[:end], rest)


def _size(kind: str, dimensions: str) -> float:
    """Return the bytes of an array."""
    return BYTES.get(kind, 0) * math.prod(int(size) for size in dimensions.split(",") if size)


def _axes(text: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes of `mesh` along which the participating devices differ."""
    sizes, different = tuple(mesh.values()), np.zeros(len(mesh), bool)
    for group in _groups(text, math.prod(sizes)):
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        different |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, yes in zip(mesh, different, strict=True) if yes)


def _groups(text: str, devices: int) -> list[list[int]]:
    """Parse the participating devices in any of XLA's notations: all pairs, or the first of equal groups."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        return [[int(device) for device in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
    if named := _NAMED.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
        grid, axes = order.reshape(tuple(sizes.values())), re.findall(r"'(\w+)'", named[3])
        return [grid[tuple(slice(None) if name in axes else 0 for name in sizes)].ravel().tolist()]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [[int(device) for device in listed[1].split(",")]]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return [_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist()]
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """Expand `[16,16]T(1,0)`: consecutive numbers in that shape, then transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(map(int, shape.split(",")))).reshape(tuple(map(int, shape.split(","))))
    return (numbers.transpose(tuple(map(int, order.split(",")))) if order else numbers).ravel()
