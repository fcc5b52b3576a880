"""Damaged images: seeded mutations of small files. `python -m tests.data.image_mutants` decodes them in this process.

`mutants COUNT SEED` prints, as JSON, the number of mutants by outcome and by what Pillow alone makes of them. A mutant
that takes more than `SECONDS` of CPU time ends the process by a signal, as one that crashes a decoder does; the last
line names it. `bombs` reads images from stdin, one line of base64 each, and prints for each the outcome and by how many
MiB it raises the peak of the memory; and then the same for the last two without limits.
"""

import base64
import functools
import io
import json
import random
import re
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from jaxmm.config import ImageConfig
from jaxmm.data import images, transforms
from jaxmm.data.images import FORMATS, BadImage

KINDS = tuple(kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000") if kind in FORMATS)
SECONDS, MEMORY = 2, 2**31
"""Limits of CPU time of one image and of the memory of the process: `MAX_PIXELS` in the widest mode, with a copy."""
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
PNG = b"\x89PNG\r\n\x1a\n"


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@functools.cache
def originals(kind):
    """Small files of a format in the modes and variants that it has."""
    y, x = np.mgrid[:19, :23]
    rgb = Image.fromarray(np.stack([x * 11, y * 13, 255 - x * 9], -1).astype(np.uint8))
    clear = rgb.copy()
    clear.putalpha(Image.fromarray((x * 11).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    deep = Image.fromarray((x * 2500).astype(np.uint16))
    return {
        "JPEG": lambda: [encode(rgb, kind), encode(rgb, kind, progressive=True, exif=exif),
                         encode(rgb.convert("CMYK"), kind)],
        "PNG": lambda: [encode(rgb, kind), encode(clear, kind, exif=exif), encode(deep, kind),
                        encode(rgb.quantize(9), kind, transparency=3), encode(rgb, kind, **frames)],
        "WEBP": lambda: [encode(rgb, kind), encode(clear, kind, lossless=True), encode(rgb, kind, **frames)],
        "GIF": lambda: [encode(rgb.quantize(9), kind), encode(rgb, kind, **frames)],
        "TIFF": lambda: [encode(rgb, kind), encode(clear, kind, compression="tiff_lzw"), encode(deep, kind),
                         encode(rgb, kind, compression="tiff_deflate")],
        "BMP": lambda: [encode(rgb, kind), encode(rgb.quantize(9), kind)],
    }.get(kind, lambda: [encode(rgb, kind), encode(clear, kind)])()


def mutant(kind, number, seed=0):
    """Mutation `number` of a file of a format."""
    rng = random.Random(f"{kind} {number} {seed}")
    data = bytearray(rng.choice(originals(kind)))
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            break
        at = rng.randrange(min(64, len(data))) if rng.random() < 0.4 else rng.randrange(len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice(EXTREMES)
            case 2:
                data[at:at + 4] = bytes([rng.choice(EXTREMES)]) * 4
            case 3:
                data[at:at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 8, 30_000, 2**24, 2**31)))
            case 4:
                del data[at:at + rng.randrange(1, 40)]
            case 5:
                data[at:at] = data[at:at + rng.randrange(1, 40)]
            case 6:
                del data[max(at, 12):]
    return repaired(bytes(data)) if kind == "PNG" and rng.random() < 0.7 else bytes(data)


def repaired(data):
    """A PNG with the right checksums: a decoder that finds a wrong one looks no further."""
    parts, start = [data[:8]], 8
    while start + 12 <= len(data):
        length = struct.unpack(">I", data[start:start + 4])[0]
        body = data[start + 4:start + 8 + length]
        parts.append(data[start:start + 4] + body + struct.pack(">I", zlib.crc32(body)))
        start += 12 + length
    return b"".join(parts)


def outcome(data):
    """The reason why an image is bad, or "read"; anything else is raised."""
    try:
        image = images.decode(data)
    except BadImage as error:
        return error.reason
    assert image.mode == "RGB" and transforms.eval_image(image, ImageConfig(size=8)).shape == (8, 8, 3)
    return "read"


def pillow_alone(data):
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:
        return type(error).__name__
    return "read"


def decode_mutants(count, seed):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    ours, pillows = {kind: Counter() for kind in KINDS}, Counter()
    for kind in KINDS:
        for number in range(count):
            data = mutant(kind, number, seed)
            print("decoding", kind, number, seed, flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)      # whose signal ends the process
            ours[kind][outcome(data)] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            pillows[pillow_alone(data)] += 1
    return {"ours": ours, "pillow alone": pillows}


def jpeg_of(width, height):
    """A JPEG whose header claims a size."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5:at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def text_bomb():
    """A PNG of a few pixels with 12 texts that inflate to 16 MiB each."""
    plain, compressed = encode(Image.new("RGB", (5, 3)), "PNG"), zlib.compress(b"x" * 2**24)
    chunks = b""
    for number in range(12):
        body = b"zTXtkey%d\0\0" % number + compressed
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return plain[:33] + chunks + plain[33:]


def bombs():
    """A header of 65,500 x 65,500 pixels, texts of 192 MiB, and a little more than `MAX_PIXELS` black ones."""
    return {"JPEG": jpeg_of(65_500, 65_500), "texts": text_bomb(),
            "PNG": encode(Image.new("1", (9_500, 9_500)), "PNG")}


def lift_the_limits():
    images.MAX_PIXELS = 2**40
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**40


def peak():
    """The peak of this process's memory in MiB. `getrusage` would count that of the process that started it."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def growth(data):
    """The outcome, and the MiB by which decoding raises the peak of this process's memory."""
    before = peak()
    return outcome(data), peak() - before


def main(what, *options):
    warnings.simplefilter("ignore")
    if what == "mutants":
        print(json.dumps(decode_mutants(*map(int, options))))
        return
    outcome(encode(Image.new("RGB", (16, 16)), "PNG"))      # loads the decoders
    bombs = [base64.b64decode(line) for line in sys.stdin]
    limited = [growth(data) for data in bombs]
    lift_the_limits()
    print(json.dumps([limited, [growth(data) for data in bombs[-2:]]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
