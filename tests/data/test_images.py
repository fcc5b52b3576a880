import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from jaxmm.data.images import BadImage, decode


def encode(image, kind="png", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(height=11, width=17, channels=3, seed=0):
    """Smooth, so that lossy formats come close."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (5 + c) + y / (7 - c) + seed + c) for c in range(channels)]
    return np.stack(waves, -1).astype(np.uint8)


def png_header(width, height):
    """A PNG that claims a size and then ends."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 50))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind, options, tolerance", [
    ("png", {}, 0), ("webp", {"lossless": True}, 0), ("webp", {"quality": 95}, 8), ("jpeg", {"quality": 95}, 8),
    ("jpeg", {"quality": 95, "progressive": True}, 8),
])
def test_formats(kind, options, tolerance):
    image = decode(encode(Image.fromarray(pixels()), kind, **options))
    assert image.mode == "RGB" and image.size == (17, 11)
    assert np.abs(np.asarray(image, int) - pixels()).mean() <= tolerance


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (5, 3), color) for color in ("red", "blue", "lime")]
    image = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True))
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to([255, 0, 0], (3, 5, 3)))


def test_cmyk_with_and_without_adobe_marker():
    image = Image.fromarray(pixels())
    adobe = encode(image.convert("CMYK"), "jpeg", quality=100)
    assert b"Adobe" in adobe
    assert np.abs(np.asarray(decode(adobe), int) - pixels()).mean() < 3
    # without the marker the values are ink, not 255 - ink
    plain = encode(ImageChops.invert(image.convert("CMYK")), "jpeg", quality=100)
    at = plain.index(b"\xff\xee")
    length = struct.unpack(">H", plain[at + 2:at + 4])[0]
    plain = plain[:at] + plain[at + 2 + length:]
    assert np.abs(np.asarray(decode(plain), int) - pixels()).mean() < 3


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 7 * 13).round().astype(np.uint16).reshape(7, 13)
    image = decode(encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(np.asarray(image), np.repeat(np.rint(deep / 257)[..., None], 3, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode):
    color, alpha = pixels(channels=1)[..., 0], pixels(channels=2)[..., 1]
    layers = [color, color, color, alpha] if mode == "RGBA" else [color, alpha]
    image = decode(encode(Image.fromarray(np.stack(layers, -1), mode)))
    expected = 255 + (color.astype(float) - 255) * alpha / 255
    assert np.abs(np.asarray(image, float) - expected[..., None]).max() <= 1


def test_transparent_colour_of_a_palette_and_of_rgb_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = decode(encode(palette, transparency=0))
    np.testing.assert_array_equal(np.asarray(image), [[[255, 255, 255], [40, 50, 60]]])
    rgb = Image.new("RGB", (2, 1), (10, 20, 30))
    rgb.putpixel((1, 0), (40, 50, 60))
    image = decode(encode(rgb, transparency=(40, 50, 60)))
    np.testing.assert_array_equal(np.asarray(image), [[[10, 20, 30], [255, 255, 255]]])


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes(mode):
    image = Image.fromarray(pixels()).convert(mode)
    np.testing.assert_array_equal(np.asarray(decode(encode(image))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels()), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode(data)
    assert image.size == ((17, 11) if orientation < 5 else (11, 17))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_garbage_in_exif_does_not_spoil_the_image():
    image = decode(encode(Image.fromarray(pixels()), "png", exif=b"Exif\0\0garbage that is no TIFF header"))
    np.testing.assert_array_equal(np.asarray(image), pixels())


@pytest.mark.parametrize("data, reason", [
    (b"", "empty"),
    (b"<html>404 not found</html>", "not an image"),
    (encode(Image.fromarray(pixels()), "bmp"), "not an image"),
    (encode(Image.fromarray(pixels(90, 90)), "jpeg")[:700], "truncated"),
    (encode(Image.fromarray(pixels(90, 90)), "png")[:-40], "truncated"),
    (png_header(30_000, 30_000), "too large"),
    (png_header(10_000, 10_000), "too large"),
    (np.zeros((3, 5, 3), np.float32), "not an image"),
    (np.zeros((0, 5, 3), np.uint8), "empty"),
])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(data, reason):
    with pytest.raises(BadImage) as error:
        decode(data)
    assert error.value.reason == reason and error.value.detail


def test_every_truncation_is_noticed():
    data = encode(Image.fromarray(pixels(40, 30)), "jpeg", quality=90)
    for share in range(1, 10):
        with pytest.raises(BadImage):
            decode(data[:len(data) * share // 10])


def test_arrays():
    np.testing.assert_array_equal(np.asarray(decode(pixels())), pixels())
    grey = pixels(channels=1)
    for array in (grey, grey[..., 0]):
        np.testing.assert_array_equal(np.asarray(decode(array)), np.repeat(grey, 3, -1))


def test_the_error_pickles():
    error = pickle.loads(pickle.dumps(BadImage("empty", "0 bytes")))
    assert (error.reason, str(error)) == ("empty", "empty: 0 bytes")
