import functools
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

from jaxmm.data.images import FORMATS, BadImage, decode, read


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
    (encode(Image.fromarray(pixels()), "ppm"), "not an image"),
    (encode(Image.fromarray(np.zeros((3, 5), np.float32)), "tiff"), "not an image"),
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


def profile(red=(0.64, 0.33), green=(0.30, 0.60), blue=(0.15, 0.06), gamma=2.2, space=b"RGB "):
    """An ICC profile with these primaries under D65, adapted to D50 as profiles are; of grey: with a gamma alone."""
    def s15(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    def white(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([white(*red), white(*green), white(*blue)], 1)
    columns = columns * np.linalg.solve(columns, white(0.3127, 0.3290))
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    adapted = np.linalg.solve(cone, np.diag(cone @ d50 / (cone @ white(0.3127, 0.3290))) @ cone) @ columns
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78 + b"\0\0"),
            (b"cprt", b"text\0\0\0\0x\0\0\0"), (b"wtpt", xyz(d50))]
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        tags += [(name, xyz(column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T, strict=True)]
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s6H4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ",
                       2024, 1, 1, 0, 0, 0, b"acsp") + b"\0" * 28 + b"".join(map(s15, d50))
    return head + b"\0" * (128 - len(head)) + table + body


P3 = functools.partial(profile, red=(0.68, 0.32), green=(0.265, 0.69))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear(x):
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def srgb(x):
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind, mode", [("png", "RGB"), ("tiff", "RGB"), ("webp", "RGB"), ("png", "RGBA"), ("png", "P"),
                                        ("bmp", "RGB")])
def test_colours_of_a_wide_profile_are_converted(kind, mode):
    """By the two matrices: primaries to XYZ under D65, and back to sRGB's."""
    colours = np.array([[[200, 40, 40], [30, 180, 60], [90, 90, 90], [250, 220, 10]]], np.uint8)
    image = Image.fromarray(colours)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    data = encode(image, kind, icc_profile=P3(), **({"lossless": True} if kind == "webp" else {}))

    def to_xyz(*primaries):
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        return columns * np.linalg.solve(columns, [0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])

    theirs = to_xyz((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
    ours = to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
    want = 255 * srgb((colours / 255) ** 2.2 @ theirs.T @ np.linalg.inv(ours).T)
    got, plain = read(data)
    if kind == "bmp":      # Pillow writes no profile into it
        np.testing.assert_array_equal(np.asarray(got), colours)
        return
    assert np.abs(np.asarray(got, int) - want).max() < 2.5 and not plain
    assert np.abs(want - colours).max() > 15
    np.testing.assert_array_equal(np.asarray(decode(Image.open(io.BytesIO(data)))), np.asarray(got))


def test_grey_and_ink_with_a_profile():
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    got = np.asarray(decode(encode(Image.fromarray(ramp), "png", icc_profile=profile(gamma=1.8, space=b"GRAY"))), float)
    assert np.abs(got - 255 * srgb((ramp / 255) ** 1.8)[..., None]).max() < 3
    alpha = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", ramp.shape[::-1], 0)])
    assert np.asarray(decode(encode(alpha, "png", icc_profile=profile(gamma=1.0, space=b"GRAY")))).min() == 255
    lab = ImageCms.applyTransform(Image.fromarray(pixels()), ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"))
    assert np.abs(np.asarray(decode(encode(lab, "tiff")), int) - pixels()).mean() < 2


@pytest.mark.parametrize("icc", [
    SRGB, profile(space=b"GRAY", gamma=1.0), b"no profile at all", P3()[:200], bytes(2**23 + 2), b""],
    ids=["sRGB", "of grey", "damaged", "cut", "too large", "empty"])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_srgb_and_unusable_profiles_change_no_bit(icc, kind):
    data = encode(Image.fromarray(pixels()), kind)
    tagged = encode(Image.fromarray(pixels()), kind, icc_profile=icc)
    image, plain = read(tagged)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))
    assert plain and read(data)[1]


def variants():
    """Files as people have them, by name."""
    y, x = np.mgrid[:23, :31]
    rgb = Image.fromarray(np.stack([x * 8, y * 11, 255 - x * 8], -1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 8
    clear = rgb.copy()
    clear.putalpha(Image.fromarray((x * 8).astype(np.uint8)))
    deep = Image.fromarray((x * 2000).astype(np.uint16))
    palette = rgb.quantize(9)
    made = {
        "jpeg, turned": encode(rgb, "jpeg", exif=exif), "png, turned": encode(rgb, "png", exif=exif),
        "tiff, turned": encode(rgb, "tiff", exif=exif), "webp, turned": encode(rgb, "webp", exif=exif),
        "transparent": encode(clear, "png"), "transparent webp": encode(clear, "webp", lossless=True),
        "transparent tiff": encode(clear, "tiff"), "16 bit": encode(deep, "png"), "16 bit tiff": encode(deep, "tiff"),
        "16 bit, one value clear": encode(deep, "png", transparency=20_000), "palette": encode(palette, "png"),
        "palette, clear": encode(palette, "png", transparency=3), "palette, alphas": encode(
            palette, "png", transparency=bytes(range(0, 252, 28))), "grey": encode(rgb.convert("L"), "png"),
        "grey, alpha": encode(clear.convert("LA"), "png"), "one bit": encode(rgb.convert("1"), "png"),
        "one bit tiff": encode(rgb.convert("1"), "tiff"), "ink": encode(rgb.convert("CMYK"), "jpeg"),
        "ink tiff": encode(rgb.convert("CMYK"), "tiff"), "bmp": encode(rgb, "bmp"), "gif": encode(palette, "gif"),
        "a profile": encode(rgb, "jpeg", icc_profile=P3()), "turned, a profile": encode(
            rgb, "png", icc_profile=P3(), exif=exif)}
    for kind in ("AVIF", "JPEG2000"):
        if kind in FORMATS:
            made[kind] = encode(rgb, kind)
    return made


VARIANTS = variants()


@pytest.mark.parametrize("name", VARIANTS)
def test_an_opened_image_is_its_file(name):
    data = VARIANTS[name]
    want = decode(data)
    opened = Image.open(io.BytesIO(data))
    got = decode(opened)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert want.size == ((23, 31) if "turned" in name else (31, 23)) and want.mode == got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decode(opened)), np.asarray(want))      # it was not changed
    if name in ("transparent", "grey, alpha", "16 bit", "one bit", "grey", "bmp"):
        np.testing.assert_array_equal(np.asarray(decode(np.asarray(opened))), np.asarray(want))
    if "turned" not in name and "profile" not in name and "ink" not in name and "clear" not in name:
        shown = Image.new("RGBA", want.size, "white")      # by Pillow's own steps
        if not name.startswith("16"):
            shown.alpha_composite(opened.convert("RGBA"))
            np.testing.assert_array_equal(np.asarray(got), np.asarray(shown.convert("RGB")))


def test_arrays_of_all_kinds():
    deep = np.arange(6 * 5 * 3, dtype=np.uint16).reshape(6, 5, 3) * 700
    np.testing.assert_array_equal(np.asarray(decode(deep)), deep >> 8)
    np.testing.assert_array_equal(np.asarray(decode(deep[..., 0].astype(">u2"))),
                                  np.repeat(np.rint(deep[..., :1] / 257), 3, -1))
    flags = np.eye(4, 7, dtype=bool)
    np.testing.assert_array_equal(np.asarray(decode(flags)), np.repeat(flags[..., None] * 255, 3, -1))
    for wrong in (deep.astype(np.int32), deep / 9, np.zeros((3, 20, 21), np.uint8), np.zeros((2, 4, 5, 3), np.uint8),
                  np.zeros(4, np.uint8), np.ones((4, 4, 3), bool)):
        with pytest.raises(BadImage, match=r"array .*; expected uint8 \[h, w, 3\]"):
            decode(wrong)


@pytest.mark.parametrize("kind, where", [
    ("zTXt", "before"), ("zTXt", "behind"), ("iTXt", "before"), ("iTXt", "behind"), ("tEXt", "before")])
def test_text_chunks_do_not_make_a_png_unreadable(kind, where):
    info, plain = PngImagePlugin.PngInfo(), encode(Image.fromarray(pixels()), "png")
    for number in range(66 if kind == "tEXt" else 1):      # Pillow's limits: 64 MB in all, 1 MB of a compressed one
        getattr(info, "add_itxt" if kind == "iTXt" else "add_text")(
            f"k{number}", "y" * 1_200_000, **({} if kind == "tEXt" else {"zip": True}))
    data = encode(Image.fromarray(pixels()), "png", pnginfo=info)
    if where == "behind":
        texts = data[33:data.index(b"IDAT") - 4]
        data = plain[:-12] + texts + plain[-12:]
    with pytest.raises(ValueError, match=r"(?i)text"):
        Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(np.asarray(decode(data)), pixels())


def test_a_profile_may_be_larger_than_a_text():
    """Pillow allows a text, and so a profile, of one megabyte."""
    large = P3() + b"\0" * 2_000_000
    data = encode(Image.fromarray(pixels()), "png", icc_profile=large)
    want = decode(encode(Image.fromarray(pixels()), "png", icc_profile=P3()))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(want))


def test_a_png_may_claim_any_length_of_text():
    data = encode(Image.fromarray(pixels()), "png")
    bomb = struct.pack(">I", 2**31 - 1) + b"zTXt" + b"k\0\0" + zlib.compress(b"x" * 2_000_000)
    with pytest.raises(BadImage):
        decode(data[:33] + bomb + data[33:])
