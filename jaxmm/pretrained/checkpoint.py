"""What a source of weights is understood to be, whatever family it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.models.clip import CLIPConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.pretrained.files import FileError
from jaxmm.pretrained.tables import Row


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's configuration, where its arrays lie, and how it wants its pictures and words."""

    family: str
    """The format's name, as `jaxmm.load` and `save` use it."""
    config: ViTConfig | CLIPConfig
    rows: list[Row] = field(repr=False)
    image: ImageConfig
    pixels: Pixels
    labels: tuple[str, ...] | None = None
    """Names of the classes that a head tells apart."""
    ignore: tuple[str, ...] = ()
    """Regular expressions of keys that hold nothing of the model."""
    notes: tuple[str, ...] = ()
    """What a user should know of this checkpoint's traps, and what was used."""


def known(table: Mapping[Any, Any], value: Any, name: str) -> Any:
    """`table[value]`; raises `FileError` naming the field `name`, the value and what is supported."""
    if value not in table:
        raise FileError(f"{name} is {value!r}; supported are {', '.join(map(str, table))}")
    return table[value]


def unsupported(config: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises `FileError` naming every field of `config` that asks for what no model of ours does."""
    odd = [f"{name} = {config[name]!r}" for name, value in wanted.items() if config.get(name, value) != value]
    if odd:
        raise FileError(f"{where} asks for what is not supported: {', '.join(odd)}")
