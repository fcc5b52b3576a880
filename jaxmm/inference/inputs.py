"""Check the images, texts, labels and templates that a user passes: one or several; anything else is refused."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from jaxmm.paths import user_path


@runtime_checkable
class SupportsArray(Protocol):
    """An array of any library."""

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        """Return the values as numpy's array."""


ImageLike = str | os.PathLike | Image.Image | np.ndarray | SupportsArray
"""A file, a PIL image, or an array uint8 [h, w, 3]."""
Images = ImageLike | Iterable[ImageLike]
"""One image or several; an array [n, h, w, 3] is n images."""
EXPECTED = "expected a file, a PIL image, an array uint8 [h, w, 3], or several"


def as_images(images: Any) -> Iterable[Any]:
    """Return one image or several as an iterable of images. Raise `TypeError` for anything else."""
    if _is_array(images):
        images = np.asarray(images)
        return [images] if images.ndim in (2, 3) else images
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (bytes, Mapping)) or not isinstance(images, Iterable):
        raise TypeError(f"images is of type {type(images).__name__}; {EXPECTED}")
    return images


def image_content(image: Any) -> bytes | np.ndarray | Image.Image:
    """Return what `jaxmm.data.images.decode` takes: the bytes of a file, or the image itself.

    Raise `OSError` for a file that cannot be read, `ConfigError` for an address, `TypeError` for what is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        path = user_path(image, "image")
        if path.is_dir():
            raise IsADirectoryError(f"image is {os.fspath(image)!r}, a folder; expected a file")
        return path.read_bytes()
    if isinstance(image, (bytes, Image.Image)):
        return image
    if _is_array(image):
        return np.asarray(image)
    raise TypeError(f"images holds an object of type {type(image).__name__}; {EXPECTED}")


def as_texts(texts: Any, name: str = "texts", *, blank: bool = True) -> list[str]:
    """Return one text or several as a list. Raise `TypeError` for anything else, `ValueError` for forbidden blanks."""
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is of type {type(texts).__name__}; expected a string or several")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} holds {text!r:.80}; expected strings")
        if not blank and not text.strip():
            raise ValueError(f"{name} holds {text!r}; expected words")
    return texts


def as_labels(labels: Any) -> list[str]:
    """Return different class names, in order. Raise `ValueError` for none and for a string, `TypeError` for others."""
    names = [] if labels is None or isinstance(labels, str) else as_texts(labels, "labels", blank=False)
    if not names:
        raise ValueError(f"labels is {labels!r}; expected a list of class names, such as ['a cat', 'a dog']")
    return list(dict.fromkeys(names))


def as_templates(templates: Any) -> list[str]:
    """Return one template or several as a list. Raise `ValueError` unless each has one `{}` for the class name."""
    templates = as_texts(templates, "templates")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates holds {template!r}; expected one {{}} in it, for the class name")
    if not templates:
        raise ValueError("templates is empty; expected one or more, such as 'a photo of a {}.'")
    return templates


def check_top(top: Any) -> None:
    """Raise `ValueError` unless `top`, the number of results, is a positive number."""
    if not isinstance(top, (int, np.integer)) or top < 1:
        raise ValueError(f"top is {top!r}; expected a positive number")


def _is_array(value: Any) -> bool:
    """Return whether `value` is an array of any library. PIL images convert to arrays too, but know more."""
    return isinstance(value, SupportsArray) and not isinstance(value, Image.Image)
