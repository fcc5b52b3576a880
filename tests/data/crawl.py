"""Tar shards as a crawl leaves them: sixteen records with different faults, and functions that write archives."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from tests.data.test_images import encode, pixels, png_header


def photo(seed=0, height=24, width=31):
    return Image.fromarray(pixels(height, width, seed=seed))


def jpeg(seed=0, **options):
    return encode(photo(seed), "jpeg", quality=90, **options)


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(5, exif=exif)


def _palette():
    picture = photo(6).convert("P")
    return encode(picture, "png", transparency=3)


CASES = {      # members by ending, and why the record is unusable
    "ok_0": ({"jpg": jpeg(1), "txt": b"coin"}, None),
    "truncated": ({"jpg": encode(photo(2, 90, 80), "jpeg")[:700], "txt": b"a mark"}, "truncated"),
    "empty": ({"jpg": b"", "txt": b"nothing"}, "empty"),
    "no_text": ({"jpg": jpeg(3)}, "no text"),
    "no_image": ({"txt": b"a caption without a picture"}, "no image"),
    "html": ({"jpg": b"<html>404 not found</html>", "txt": b"haircut"}, "not an image"),
    "cmyk": ({"jpg": encode(photo(4).convert("CMYK"), "jpeg"), "txt": b"a clock"}, None),
    "gray16": ({"png": encode(Image.fromarray(np.arange(77, dtype=np.uint16).reshape(7, 11) * 800)),
                "txt": b"a grey square"}, None),
    "palette": ({"png": _palette(), "txt": b"seven"}, None),
    "animated": ({"gif": encode(photo(7), "gif", save_all=True, append_images=[photo(8)]), "txt": b"water"}, None),
    "rotated": ({"jpg": _rotated(), "txt": b"chopsticks"}, None),
    "bomb": ({"png": png_header(30_000, 30_000), "txt": b"nothing at all"}, "too large"),
    "bad_utf8": ({"jpg": jpeg(9), "txt": b"caf\xe9 table"}, None),
    "nul_text": ({"jpg": jpeg(10), "txt": b"a cup\0 of tea"}, None),
    "long_text": ({"jpg": jpeg(11), "txt": b"very " * 200_000}, None),
    "blank_text": ({"jpg": jpeg(12), "txt": b" \t\n"}, "no text"),
}


def files(cases):
    """Return names and contents of the members of `cases`."""
    return [(f"{key}.{ending}", content) for key, (members, _) in cases.items()
            for ending, content in members.items()]


def pairs(start, count):
    """Return good records, as img2dataset writes them."""
    return [(f"{number:09d}.{ending}", content) for number in range(start, start + count) for ending, content in (
        ("jpg", jpeg(number)), ("txt", f"picture {number}".encode()),
        ("json", json.dumps({"key": number, "caption": "not this"}).encode()))]


def write_tar(path, contents, **options):
    """Write a tar of (name, bytes) pairs or `TarInfo`s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for item in contents:
            if isinstance(item, tarfile.TarInfo):
                tar.addfile(item)
                continue
            info = tarfile.TarInfo(item[0])
            info.size = len(item[1])
            tar.addfile(info, io.BytesIO(item[1]))
    return path
