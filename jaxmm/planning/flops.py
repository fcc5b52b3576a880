"""FLOPs of a traced function: matrix products, including every iteration of loops."""

from typing import Any, NamedTuple

import numpy as np

RECOMPUTED = ("rematted_computation", "recomputed")
"""Name scopes of recomputation: JAX's, and jaxmm's."""


class Flops(NamedTuple):
    """FLOPs over all devices; a multiplication and an addition are two."""

    all: float
    """All FLOPs."""
    model: float
    """FLOPs without recomputation."""


def count_jaxpr(closed: Any) -> Flops:
    """Count the FLOPs of a closed jaxpr."""
    return _count(closed.jaxpr, 1.0, False)


def _count(jaxpr: Any, times: float, recomputed: bool) -> Flops:
    total = Flops(0.0, 0.0)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        repeated = recomputed or any(scope in str(equation.source_info.name_stack) for scope in RECOMPUTED)
        if name == "dot_general":
            flops = times * _product(equation)
            total = Flops(total.all + flops, total.model + (0 if repeated else flops))
            continue
        repeats = times
        if name == "cond":      # one branch runs; a kernel's fallback for CPU is a branch too
            branches = [_count(branch.jaxpr, times, repeated) for branch in params["branches"]]
            total = Flops(*(a + max(b) for a, b in zip(total, zip(*branches, strict=True), strict=True)))
            continue
        if name == "scan":
            repeats = times * params["length"]
        elif name == "shard_map":
            repeats = times * params["mesh"].size
        for inner in _inner_jaxprs(params.values()):
            total = Flops(*(a + b for a, b in zip(total, _count(inner, repeats, repeated), strict=True)))
    return total


def _inner_jaxprs(values: Any) -> Any:
    """Yield the jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inner_jaxprs(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr


def _product(equation: Any) -> float:
    """Return the FLOPs of one `dot_general`: two per element of the result and per summed index."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * float(np.prod(out, dtype=float)) * float(np.prod([left[i] for i in contracted], dtype=float))
