"""Define scenes of coloured shapes, draw random ones, and render them as images."""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, ImageDraw

T = TypeVar("T")
RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (215, 30, 40), "orange": (250, 140, 25), "yellow": (240, 210, 20), "green": (35, 150, 60),
    "blue": (35, 80, 215), "purple": (125, 45, 165), "pink": (250, 130, 190), "black": (25, 25, 25),
}
SIZES: dict[str, float] = {"small": 0.095, "large": 0.175}
"""About half the extent of a shape, as a share of the image's side."""
CELLS = (("in the top left corner", "at the top", "in the top right corner"),
         ("on the left", "in the middle", "on the right"),
         ("in the bottom left corner", "at the bottom", "in the bottom right corner"))
"""Phrases for the nine cells of the image, rows from the top."""

_GRID = 512       # positions and radii are multiples of 1 / _GRID: the same pixels everywhere
_CLEAR = 0.1      # minimum difference between the distances along the two axes, for an unambiguous relation
_GAP = 0.03       # smallest distance between two shapes
_SUPERSAMPLE = 4


def _circle(points: int, radius: float = 1.0, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [math.tau * (i / points + turn) for i in range(points)]
    return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]


def _heart(points: int) -> list[tuple[float, float]]:
    angles = [math.tau * i / points for i in range(points)]
    return [(math.sin(a) ** 3,
             (2.5 - 13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a) - 5) / 16)
            for a in angles]


def _zip(outer: list, inner: list) -> list[tuple[float, float]]:
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _circle(72, 0.95),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": _zip(_circle(5, 1.1), _circle(5, 0.45, turn=0.1)),
    "cross": [(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
              (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)],
    "heart": _heart(72),
    "diamond": [(0, -1.1), (0.68, 0), (0, 1.1), (-0.68, 0)],
}
"""Outlines around (0, 0), which every shape covers, with a radius of about 1; y points down."""


@dataclass(frozen=True, kw_only=True)
class Object:
    """A shape: its centre (`x` to the right, `y` down) and `radius` are shares of the image's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three objects, large ones first and then in reading order, on a light background."""

    objects: tuple[Object, ...]
    ground: tuple[RGB, RGB] = ((240, 240, 240), (240, 240, 240))
    """Colours at the top and at the bottom of the background."""


def relation(a: Object, b: Object) -> str:
    """Return the position of `a` relative to `b`, along the axis on which they are farther apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def cell(o: Object) -> str:
    """Return the phrase for the cell of the image that contains the object's centre."""
    return CELLS[int(o.y * 3)][int(o.x * 3)]


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Return one of `options`, by `random()` alone, whose sequence for a seed no Python version changes."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: random.Random, values: Sequence[T]) -> list[T]:
    """Return `values` in a random order, with the same guarantee as `pick`."""
    return [values[i] for _, i in sorted((rng.random(), i) for i in range(len(values)))]


def _clear(a: Object, b: Object) -> bool:
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return abs(dx - dy) >= _CLEAR and math.sqrt(dx * dx + dy * dy) >= a.radius + b.radius + _GAP


def _place(rng: random.Random, shape: str, color: str, size: str, alone: bool) -> Object:
    radius = SIZES[size] * (0.95 + 0.1 * rng.random())
    if alone:      # well inside a cell of the image, so that its phrase is unambiguous
        x, y = ((int(rng.random() * 3) + 0.35 + 0.3 * rng.random()) / 3 for _ in "xy")
    else:
        x, y = rng.random(), rng.random()
    x, y = (min(max(v, 1.1 * radius + 0.02), 0.98 - 1.1 * radius) for v in (x, y))
    x, y, radius = (round(v * _GRID) / _GRID for v in (x, y, radius))
    return Object(shape=shape, color=color, size=size, x=x, y=y, radius=radius)


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene whose objects differ in colour or shape, do not touch, and have clear relations."""
    u = rng.random()
    count = 1 if u < 0.06 else 2 if u < 0.5 else 3      # one object has only 1,008 descriptions
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        alike = bool(looks) and rng.random() < 0.2      # something to count
        look = (looks[0][0] if alike else pick(rng, tuple(SHAPES)), pick(rng, tuple(COLORS)))
        if look not in looks:
            looks.append(look)
    sizes = [pick(rng, tuple(SIZES)) for _ in looks]
    objects: list[Object] = []
    while len(objects) < count:
        o = _place(rng, *looks[len(objects)], sizes[len(objects)], alone=count == 1)
        if all(_clear(o, other) for other in objects):
            objects.append(o)
        elif rng.random() < 0.1:      # the objects so far may leave no room
            objects.clear()
    objects.sort(key=lambda o: (o.size != "large", int(o.y * 3), o.x))
    top = [225 + int(rng.random() * 31) for _ in "rgb"]
    bottom = [value - int(rng.random() * 16) for value in top]
    return Scene(objects=tuple(objects), ground=(tuple(top), tuple(bottom)))


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Render the scene as an RGB image of `size` x `size` pixels."""
    top, bottom = scene.ground
    span = max(size - 1, 1)
    column = Image.new("RGB", (1, size))
    column.putdata([tuple(t + (b - t) * row // span for t, b in zip(top, bottom, strict=True))
                    for row in range(size)])
    side = size * _SUPERSAMPLE
    canvas = column.resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for o in scene.objects:
        outline = [(round((o.x + o.radius * x) * side), round((o.y + o.radius * y) * side))
                   for x, y in SHAPES[o.shape]]
        pen.polygon(outline, fill=COLORS[o.color])
    return canvas.reduce(_SUPERSAMPLE)


def png(scene: Scene, size: int = 64) -> bytes:
    """Render the scene as the bytes of a PNG file."""
    buffer = io.BytesIO()
    draw(scene, size).save(buffer, "png", compress_level=3)
    return buffer.getvalue()
