"""The source `shapes`: images of one coloured shape each, with its name as the label, drawn when they are read."""

import random
from dataclasses import dataclass

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.scenes.drawing import COLORS, SHAPES, SIZES, Object, Scene, draw, pick

SPLITS = {"train": 2000, "val": 1000, "test": 1000}
SIDE = 32
"""Side of the images in pixels."""


@dataclass(frozen=True, kw_only=True)
class Shapes(Source):
    """A split. Record i depends on the split and on i only; the labels take turns."""

    name: str
    split: str
    classes: tuple[str, ...] = tuple(SHAPES)

    @property
    def fingerprint(self) -> str:
        """A digest of the split's name and size."""
        return fingerprint(["shapes", self.split, len(self)])

    def __len__(self):
        return SPLITS[self.split]

    def __getitem__(self, index: int) -> Record:
        """Draw one image: colour, size and place are random."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng, label = random.Random(f"shapes {self.split} {index}"), index % len(self.classes)
        size = pick(rng, tuple(SIZES))
        radius = SIZES[size]
        x, y = (1.1 * radius + (1 - 2.2 * radius) * rng.random() for _ in "xy")
        shape = Object(shape=self.classes[label], color=pick(rng, tuple(COLORS)), size=size, x=x, y=y, radius=radius)
        return {"key": self.key(index), "image": np.asarray(draw(Scene(objects=(shape,)), SIDE)), "label": label}

    def key(self, index: int) -> str:
        """Return the name of the source and the record number."""
        return f"{self.name}#{index}"


def open_shapes(spec: str, location: str, data_dir: str | None = None) -> Shapes:
    """Open `shapes:SPLIT`."""
    if location not in SPLITS:
        raise DataError(f"source {spec!r}: unknown split {location!r}; expected one of {', '.join(SPLITS)}")
    return Shapes(name=spec, split=location)
