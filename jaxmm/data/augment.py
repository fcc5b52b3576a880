"""RandAugment (Cubuk et al. 2019) with the operations and ranges of big_vision, drawn by Pillow."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)
"""The colour of areas that a rotation, shear or shift uncovers, and of the cut-out square."""

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def rand_augment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """Apply `layers` operations, each drawn uniformly from `OPERATIONS`, at `magnitude` (10 is a level of 1)."""
    for operation in rng.integers(len(OPERATIONS), size=layers).tolist():
        image = _OPERATIONS[operation](image, magnitude / 10, rng)
    return image


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _enhance(kind) -> Operation:
    """Return an operation with factor 0.1 at level 0 and 1.9 at level 1; factor 1 changes nothing."""
    return lambda image, level, rng: kind(image).enhance(0.1 + 1.8 * level)


def _rotate(image, level, rng):
    return image.rotate(_signed(30 * level, rng), Image.Resampling.NEAREST, fillcolor=GREY)


def _affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


def _shear_x(image, level, rng):
    return _affine(image, 1, _signed(0.3 * level, rng), 0, 0, 1, 0)


def _shear_y(image, level, rng):
    return _affine(image, 1, 0, 0, _signed(0.3 * level, rng), 1, 0)


def _translate_x(image, level, rng):
    return _affine(image, 1, 0, _signed(100 / 224 * image.width * level, rng), 0, 1, 0)


def _translate_y(image, level, rng):
    return _affine(image, 1, 0, 0, 0, 1, _signed(100 / 224 * image.height * level, rng))


def _solarize_add(image, level, rng):
    add = int(110 * level)
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def _cutout(image, level, rng):
    half = int(40 / 224 * image.width * level)
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(GREY, (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half)))
    return image


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, level, rng: ImageOps.equalize(image),
    "invert": lambda image, level, rng: ImageOps.invert(image),
    "rotate": _rotate,                    # by +-30 degrees at level 1
    "posterize": lambda image, level, rng: ImageOps.posterize(image, min(8, int(4 * level))),  # bits kept: 0 to 4
    "solarize": lambda image, level, rng: ImageOps.solarize(image, int(256 * level)),  # inverts from 0 up to 256 on
    "color": _enhance(ImageEnhance.Color),            # these four: factor 0.1 to 1.9
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,                  # by +-0.3 at level 1
    "shear_y": _shear_y,
    "translate_x": _translate_x,          # by +-100 pixels of 224 at level 1, and as much of other sizes
    "translate_y": _translate_y,
    "cutout": _cutout,                    # a square of up to 80 x 80 pixels of 224, centred anywhere
    "solarize_add": _solarize_add,        # dark pixels (below 128) get 0 to 110 brighter
}
"""Every operation by name: `(image, level, rng) -> image`. Level 0 does not mean "no change": posterize keeps no
bit then, solarize inverts everything and the four enhancers are at 0.1 (so in the published code, and kept)."""

_OPERATIONS = tuple(OPERATIONS.values())
