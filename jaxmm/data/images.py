"""Decode images to RGB, the way a person sees them; report what cannot be decoded, never guess."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from jaxmm.data.bad_records import BadRecord

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 90_000_000
"""The largest size that is decoded; the header decides (a PNG of 100 kB can have a gigapixel)."""

_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(BadRecord):
    """An image that cannot be decoded: empty, not an image, too large, truncated or corrupt."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """Decode a JPEG, PNG, WebP or GIF (its first frame), or uint8 pixels, to an upright RGB image.

    16-bit grey is scaled, CMYK converted, transparency becomes white, EXIF orientation is applied. Raises `BadImage`.
    """
    return read(data)[0]


def read(data: bytes | np.ndarray) -> tuple[Image.Image, bool]:
    """Decode an image; also return True if every reader sees the same: an upright 8-bit RGB JPEG or PNG."""
    if isinstance(data, np.ndarray):
        return _from_array(data), False
    image = _open(data)
    try:
        image.load()
        upright = _upright(image, to_rgb(image))
        return upright, upright is image and _is_plain(image, data)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the decoders raise nearly anything
        raise BadImage(*_damage(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip 16-bit values at 255
        deep = np.clip(np.asarray(image, np.float64), 0, 65535)
        return Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every CMYK JPEG, as only Adobe's need
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (255, 255):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":  # Pillow reduces 16 bits to 8; byte 24 is the depth
        return data[24] == 8 and not getattr(image, "is_animated", False)
    return image.format in ("JPEG", "MPO")


def _open(data: bytes) -> Image.Image:
    """Read the header and refuse what should not be decoded."""
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("not an image", f"begins with {data[:12]!r}; expected JPEG, PNG, WebP or GIF") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too large", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage(*_damage(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
    return image


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate or flip `image` by the EXIF orientation of `source`, from which it was made."""
    if not any(key in source.info for key in ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")):
        return image
    try:
        orientation: Any = source.getexif().get(_ORIENTATION)
    except Exception:  # invalid metadata does not affect the pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise BadImage("not an image", f"array {pixels.dtype}{list(pixels.shape)}; expected uint8 [h, w, 3]")
    if pixels.size == 0:
        raise BadImage("empty", f"array of shape {list(pixels.shape)}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(pixels).convert("RGB")


def _damage(error: Exception) -> tuple[str, str]:
    text = f"{error}" or type(error).__name__
    return ("truncated" if "truncated" in text.lower() else "corrupt"), text
