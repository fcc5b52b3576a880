"""Decode images to RGB, the way a person sees them; report what cannot be decoded, never guess.

Encoded bytes, PIL images and arrays all pass through `read`, so that an image is the same however it comes.
"""

import io
import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError, features

from jaxmm.data.bad_records import BadRecord

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(name for name, feature in (
    ("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if (
        feature in (*features.modules, *features.codecs) and features.check(feature))))
"""Pillow's names of the formats that are read. It may have been built without the last two."""
MAX_PIXELS = 90_000_000
"""The largest size that is decoded; the header decides (a PNG of 100 kB can have a gigapixel)."""
MAX_PROFILE = 2**23
"""The largest ICC profile in bytes that is applied."""
SAME = 2
"""Levels of 255: a profile that changes no colour by more is sRGB itself, and pixels stay as they are."""

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
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
_PNG = b"\x89PNG\r\n\x1a\n"


class BadImage(BadRecord):
    """An image that cannot be decoded: empty, not an image, too large, truncated or corrupt."""


def decode(data: bytes | np.ndarray | Image.Image) -> Image.Image:
    """Decode encoded bytes (the first frame), pixels or a PIL image to an upright RGB image.

    Bytes may be of any of `FORMATS`. Pixels are uint8 or uint16, [h, w] or [h, w, channels]: grey, grey and alpha, RGB
    or RGBA. 16 bits are scaled, CMYK converted, colours with an ICC profile converted to sRGB, transparency becomes
    white, EXIF orientation is applied. Raises `BadImage`.
    """
    return read(data)[0]


def header_size(data: bytes) -> tuple[int, int]:
    """Return width and height as the header of an encoded image says. Raises `BadImage`."""
    try:
        return _open(data).size
    except (MemoryError, BadImage):
        raise
    except Exception as error:  # as in `read`
        raise BadImage(*_damage(error)) from None


def read(data: bytes | np.ndarray | Image.Image) -> tuple[Image.Image, bool]:
    """Decode an image; also return True if every reader sees the same: an upright 8-bit sRGB JPEG or PNG."""
    try:
        image = (data if isinstance(data, Image.Image) else _from_array(data) if isinstance(data, np.ndarray)
                 else _load(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage("too large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
        image.load()
        upright = _upright(image, to_rgb(image))
        return upright, isinstance(data, bytes) and upright is image and _is_plain(image, data)
    except (MemoryError, BadImage):
        raise
    except Exception as error:  # damaged bytes make the decoders raise nearly anything
        raise BadImage(*_damage(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit sRGB, transparency to white. Raises `BadImage` for float pixels."""
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and "transparency" not in image.info and not profile:
        return image
    if image.mode == "F":
        raise BadImage("not an image", "its pixels are floating-point; expected 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every CMYK JPEG, as only Adobe's need
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by their alpha already
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("LA" if profile and image.mode in ("L", "LA") else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    image = _to_srgb(image, profile)
    if image.mode in ("LA", "RGBA") and image.getextrema()[-1] != (255, 255):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, where convert("RGB") would clip at 255; with alpha if one value is transparent."""
    deep = np.clip(np.asarray(image, np.float64), 0, 65535)
    grey = Image.fromarray(np.rint(deep / 257).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Convert colours by an ICC profile; return the same image if there is none, or if it is sRGB."""
    base = {"RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
    profile = profile if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE else b""
    if base not in _SPACES or not (profile or base == "LAB"):
        return image
    transform = _srgb_transform(profile, base)
    if transform is None:
        return image
    converted = transform.apply(image if image.mode == base else image.convert(base))
    if image.mode != base:
        converted.putalpha(image.getchannel("A"))
    return converted


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> Any:
    """Return the transform of a profile to sRGB; None if it is sRGB, damaged, or of another colour space than `mode`.

    Damaged metadata does not affect the pixels, so no viewer refuses such an image. LAB needs no profile.
    """
    from PIL import ImageCms

    try:
        source = (ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else
                  ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode in ("RGB", "L"):
        levels = np.linspace(0, 255, 18 if mode == "RGB" else 256).astype(np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
        after = np.asarray(transform.apply(Image.fromarray(grid)), int)
        if np.abs(after - (grid if mode == "RGB" else grid[..., None])).max() <= SAME:
            return None
    return transform


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":  # Pillow reduces 16 bits to 8; byte 24 is the depth
        return data[24] == 8 and not getattr(image, "is_animated", False)
    return image.format in ("JPEG", "MPO")


def _load(data: bytes) -> Image.Image:
    """Decode bytes. A PNG whose texts or profile are too large for Pillow is read without its texts."""
    try:
        image = _open(data)
        image.load()
    except ValueError as error:
        if not data.startswith(_PNG) or "text" not in str(error).lower():
            raise
        data, profile = _without_text(data)
        image = _open(data)
        image.load()
        image.info["icc_profile"] = profile
    return image


def _open(data: bytes) -> Image.Image:
    """Read the header and refuse what should not be decoded."""
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage("not an image", f"begins with {data[:12]!r}; expected {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too large", str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
    return image


def _without_text(data: bytes) -> tuple[bytes, bytes]:
    """Return a PNG without its texts and its profile, and the profile, of `MAX_PROFILE` + 1 bytes at most."""
    parts, profile, start = [_PNG], b"", len(_PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[start:start + 8])
        if kind == b"iCCP":
            _, _, compressed = data[start + 8:start + 8 + length].partition(b"\0")
            profile = zlib.decompressobj().decompress(compressed[1:], MAX_PROFILE + 1)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            parts.append(data[start:start + 12 + length])
        start += 12 + length
    return b"".join(parts), profile


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
    """Return pixels as an image of their mode. 16-bit colours keep their high byte, as Pillow reads them in files."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    deep = pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2
    if not (pixels.dtype == np.uint8 or deep or (pixels.dtype == bool and pixels.ndim == 2)) or (
            pixels.ndim not in (2, 3) or channels not in (1, 2, 3, 4)):
        raise BadImage("not an image", f"array {pixels.dtype}{list(pixels.shape)}; expected uint8 [h, w, 3]")
    if pixels.size == 0:
        raise BadImage("empty", f"array of shape {list(pixels.shape)}")
    if channels == 1:
        pixels = pixels.reshape(pixels.shape[:2])
    if deep:
        pixels = pixels.astype(np.uint16) if channels == 1 else (pixels >> 8).astype(np.uint8)
    return Image.fromarray(pixels)


def _damage(error: Exception) -> tuple[str, str]:
    text = f"{error}" or type(error).__name__
    return ("truncated" if "truncated" in text.lower() else "corrupt"), text
