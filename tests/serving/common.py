"""Services over small models, and uploads."""

import io
import struct
import zlib
from dataclasses import replace

from PIL import Image

from jaxmm.inference.generate import Decoding
from jaxmm.serving.limits import Limits
from jaxmm.serving.model_service import ModelService
from tests.pretrained import tiny

DECODING = Decoding(beams=3, min_length=3, max_length=9)
LIMITS = Limits(batch=4, texts=5, characters=40, collect=0.0)


def service(model, **options):
    limits = replace(LIMITS, **{name: options.pop(name) for name in set(options) & set(Limits.__dataclass_fields__)})
    return ModelService(model, "tiny", decoding=DECODING, limits=limits, **options)


def png(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def uploads(count):
    return [png(picture) for picture in tiny.pictures(count)]


def bomb():
    """A PNG of 45 bytes whose header says 200 megapixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)) + chunk(
        b"IEND", b"")
