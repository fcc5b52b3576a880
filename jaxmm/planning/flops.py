"""Floating-point operations of a traced function: products of matrices, loops counted."""

from typing import Any, NamedTuple

import jax
import numpy as np

AGAIN = ("rematted_computation", "recomputed")
"""Names under which a function computes what it has computed before: JAX's own, and jaxmm's."""


class Flops(NamedTuple):
    """A multiplication and an addition are two. Over all devices."""

    all: float
    """Everything."""
    model: float
    """Without what is computed a second time to save memory."""


def count(function: Any, *arguments: Any) -> Flops:
    """Those of `function` of arguments that may be shapes."""
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def count_jaxpr(traced: Any) -> Flops:
    """Those of a closed jaxpr."""
    return _count(traced.jaxpr, 1.0, False)


def _count(jaxpr: Any, times: float, again: bool) -> Flops:
    total = Flops(0.0, 0.0)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        repeated = again or any(word in str(equation.source_info.name_stack) for word in AGAIN)
        if name == "dot_general":
            here = times * _product(equation)
            total = Flops(total.all + here, total.model + (0 if repeated else here))
            continue
        inside = times
        if name == "cond":      # one of them runs: on CPU what a kernel does elsewhere is spelled out
            branches = [_count(branch.jaxpr, times, repeated) for branch in params["branches"]]
            total = Flops(*(a + max(each) for a, each in zip(total, zip(*branches, strict=True), strict=True)))
            continue
        if name == "scan":
            inside = times * params["length"]
        elif name == "shard_map":
            inside = times * params["mesh"].size
        for inner in _inner(params.values()):
            total = Flops(*(a + b for a, b in zip(total, _count(inner, inside, repeated), strict=True)))
    return total


def _inner(values: Any) -> Any:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inner(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value.jaxpr


def _product(equation: Any) -> float:
    """Of one `dot_general`: two for each element of the result and each that is summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * float(np.prod(out, dtype=float)) * float(np.prod([left[i] for i in contracted], dtype=float))
