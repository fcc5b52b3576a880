"""Config validation: errors name the field, the value and what is allowed."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the value and what is allowed."""


def require(condition: object, name: str, value: object, expected: str) -> None:
    """Raise `ConfigError` with the field `name`, its `value` and what is `expected`, unless `condition` is true."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


def count_steps(value: float, steps: int) -> int:
    """Return a number of steps: `value` itself, or that share of a run of `steps` if it is below 1."""
    return round(value * steps) if value < 1 else round(value)


@dataclass(frozen=True)
class Limit:
    """A limit of a field's value, in the field's annotation; None is within all limits."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Limit:
    """Return the limit of a number that is `least` or more."""
    return Limit(f"{least} or more", lambda value: value >= least)


POSITIVE = Limit("a positive number", lambda value: value > 0)
BELOW_ONE = Limit("0 or more, below 1", lambda value: 0 <= value < 1)
UP_TO_ONE = Limit("above 0, at most 1", lambda value: 0 < value <= 1)


def check_types(config: Any, name: str = "") -> None:
    """Raise `ConfigError` if a field of the dataclass `config` has a value that its annotation does not allow.

    An annotation is a type, or `Annotated[type, Limit(...)]`. The command line checks types itself; this is for
    recipes, which are Python. `name` is the prefix of the fields' names in messages.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for part in dataclasses.fields(config):
        hint, value, limits = hints[part.name], getattr(config, part.name), ()
        if typing.get_origin(hint) is Annotated:
            hint, *limits = typing.get_args(hint)
        field = f"{name}.{part.name}".lstrip(".")
        require(_allows(hint, value), field, value, _expected(hint))
        require(_is_finite(value), field, value, "finite numbers")
        for limit in limits:
            if isinstance(limit, Limit) and value is not None:
                require(limit.holds(value), field, value,
                        limit.expected + (", or None" if _allows(hint, None) else ""))


def _allows(hint: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is None:
        return hint is Any or value is None
    if origin is Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_allows(part, value) for part in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = [inner[0]] * len(value) if inner[-1:] == (...,) else inner
        return len(parts) == len(value) and all(map(_allows, parts, value))
    if hint in (int, float):
        number = (int,) if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _is_finite(value: Any) -> bool:
    """Return whether a number, or every number in a tuple, is neither infinite nor NaN; others count as finite."""
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """Raise `ConfigError` if one of `patterns`, in the field `name`, is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{name} holds {pattern!r}; expected a regular expression: {error}") from None
