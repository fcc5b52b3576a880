"""Formulas over scores, such as `itm > 0.5 or clip > quantile(clip, 0.7)`: parsed, checked, and computed in numpy.

Nothing is executed: the syntax tree may have comparisons, `and`, `or`, arithmetic, numbers, names of scores and
`quantile(SCORE, SHARE)`, the value that a share of all texts is below. A comparison with a missing score is false.
"""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxmm.validation import require

COMPARISONS: dict[type, Callable] = {ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt,
                                     ast.LtE: operator.le}
ARITHMETIC: dict[type, Callable] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                                    ast.Div: operator.truediv}
CHOICES: dict[type, Callable] = {ast.And: np.logical_and, ast.Or: np.logical_or}
QUANTILE = "quantile"
LONGEST = 1000
"""Most characters of a formula."""

Quantile = tuple[str, float]
"""A score and a share of the texts."""


class _Refused(Exception):
    """A part of a formula that is not allowed; the message says what is wrong."""


@dataclass(frozen=True)
class Formula:
    """A checked formula."""

    tree: ast.expr
    names: frozenset[str]
    """Scores that it reads."""
    quantiles: frozenset[Quantile]
    """Quantiles that it reads."""

    def __call__(self, scores: Mapping[str, np.ndarray], quantiles: Mapping[Quantile, float]) -> Bool[np.ndarray, " n"]:
        """Return for which texts the formula holds; missing scores are NaN."""
        with np.errstate(all="ignore"):
            return np.broadcast_to(_compute(self.tree, scores, quantiles), len(next(iter(scores.values()))))


def parse(text: str, names: Collection[str], field: str = "formula") -> Formula:
    """Return the formula in `text` over the scores `names`. Raise `ConfigError`, which lists them, for any other."""
    try:
        if len(text) > LONGEST:
            raise _Refused(f"it has more than {LONGEST} characters")
        tree = ast.parse(text.strip(), mode="eval").body
        quantiles: set[Quantile] = set()
        _check_choice(tree, names, quantiles)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(names)
        if not used:
            raise _Refused("it reads no score")
    except (SyntaxError, ValueError, RecursionError, MemoryError, _Refused) as error:
        reason = error if isinstance(error, _Refused) else "it cannot be parsed"
        require(False, field, text[:200], f"comparisons of the scores {', '.join(names)} such as "
                f"{next(iter(names), 'itm')} > 0.5, joined by and, or: {reason}")
    return Formula(tree, frozenset(used), frozenset(quantiles))


def _check_choice(node: ast.expr, names: Collection[str], quantiles: set[Quantile]) -> None:
    """Check an expression that is true or false. Raise `_Refused`."""
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_choice(part, names, quantiles)
    elif isinstance(node, ast.Compare):
        for kind in node.ops:
            if type(kind) not in COMPARISONS:
                raise _Refused("a comparison is one of >, >=, <, <=")
        for part in (node.left, *node.comparators):
            _check_number(part, names, quantiles)
    else:
        raise _Refused(f"{ast.unparse(node)[:80]!r} is no comparison")


def _check_number(node: ast.expr, names: Collection[str], quantiles: set[Quantile]) -> None:
    """Check an expression that is a number for every text. Raise `_Refused`."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not abs(value) < 1e30:
                raise _Refused("a number is too large")
        case ast.Name(id=name):
            if name not in names:
                raise _Refused(f"there is no score {name[:80]!r}")
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            _check_number(inner, names, quantiles)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in ARITHMETIC:
            _check_number(left, names, quantiles)
            _check_number(right, names, quantiles)
        case ast.Call(func=ast.Name(id="quantile"), keywords=[], args=[
                ast.Name(id=name), ast.Constant(value=int() | float() as share)]) if name in names and 0 <= share <= 1:
            quantiles.add((name, float(share)))
        case _:
            raise _Refused(f"{ast.unparse(node)[:80]!r} is no score, number, or {QUANTILE}(SCORE, SHARE)")


def _compute(node: ast.expr, scores: Mapping[str, np.ndarray], quantiles: Mapping[Quantile, float]) -> Any:
    def compute(part):
        return _compute(part, scores, quantiles)

    match node:
        case ast.BoolOp(op=kind, values=parts):
            return reduce(CHOICES[type(kind)], map(compute, parts))
        case ast.Compare(left=left, ops=kinds, comparators=others):
            values = [compute(left), *map(compute, others)]
            return reduce(np.logical_and, (COMPARISONS[type(kind)](*pair) for kind, pair in zip(
                kinds, pairwise(values), strict=True)))
        case ast.UnaryOp(operand=inner):
            return -compute(inner)
        case ast.BinOp(left=left, op=kind, right=right):
            return ARITHMETIC[type(kind)](compute(left), compute(right))
        case ast.Call(args=[ast.Name(id=name), ast.Constant(value=share)]):
            return np.float64(quantiles[name, float(share)])
        case ast.Constant(value=value):
            return np.float64(value)
    return scores[node.id].astype(np.float64)
