"""Transform PIL images of any size to uint8 squares, on the host; the device normalises by mean and deviation.

A crop is resized directly from the image (`Image.resize(size, box=...)`), so that only the crop is computed: resizing
the shorter side of a 1 x 10,000 image to 224 would make 224 x 2,240,000 pixels.
"""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxmm.config import ImageConfig

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Box = tuple[int | float, int | float, int | float, int | float]
"""Left, top, right, bottom in pixels of the image."""


def train_image(
    image: Image.Image, config: ImageConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Apply the random crop, flip and RandAugment of `config`; `rng` is the only source of randomness."""
    size, method = config.size, FILTERS[config.interpolation]
    if config.train_crop == "random":
        image = _resize(image, size, method, random_box(image.size, config.scale, config.ratio, rng))
    elif config.train_crop == "pad":
        shift = size // 8
        left, top = rng.integers(-shift, shift + 1, size=2).tolist()
        # pixels outside the image become black
        image = center_crop(image, size, method=method).crop((left, top, left + size, top + size))
    elif config.train_crop == "center":
        image = center_crop(image, size, config.eval_resize, method)
    else:
        image = _resize(image, size, method)
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.randaugment_layers:
        from jaxmm.data.augment import rand_augment  # Pillow's filters, which evaluation does without

        image = rand_augment(image, config.randaugment_layers, config.randaugment_magnitude, rng)
    return np.asarray(image)


def eval_image(image: Image.Image, config: ImageConfig) -> UInt8[np.ndarray, "size size 3"]:
    """Resize and take the central square, or squash the image, as `config` says."""
    size, method = config.size, FILTERS[config.interpolation]
    if config.eval_crop != "squash":
        return np.asarray(center_crop(image, size, config.eval_resize, method,
                                      floor=config.eval_crop == "center_floor"))
    side = round(size * config.eval_resize)
    margin = (side - size) // 2
    return np.asarray(_resize(image, side, method).crop((margin, margin, margin + size, margin + size)))


def random_box(
    image_size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a random resized crop: uniform share of the area, log-uniform aspect ratio; after ten tries the centre.

    Inception's crop, sampled like torchvision's `RandomResizedCrop`.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_crop(
    image: Image.Image, size: int, resize: float = 1.0, method: Image.Resampling = Image.Resampling.BICUBIC, *,
    floor: bool = False,
) -> Image.Image:
    """Resize the shorter side to `resize` x `size`, then take the central `size` x `size`.

    Sizes and margins are rounded like torchvision's `Resize` and `CenterCrop`, which the preprocessing of CLIP and
    ImageNet uses; with `floor` the margins are rounded down, like transformers' processors.
    """
    width, height = image.size
    short = round(size * resize)
    if width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    half = math.floor if floor else round
    left, top = half((wide - size) / 2), half((high - size) / 2)
    if max(wide, high) <= 4 * short:
        # bit for bit as published; with a box Pillow may take the axes in the other order and round differently
        return image.resize((wide, high), method).crop((left, top, left + size, top + size))
    x, y = width / wide, height / high
    box = left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)
    return _resize(image, size, method, box)


def _resize(image: Image.Image, size: int, method: Image.Resampling, box: Box | None = None) -> Image.Image:
    """Resize with Pillow's antialiasing, which published models were trained with."""
    return image.resize((size, size), method, box=box)
