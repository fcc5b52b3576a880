"""Mutated and malicious images: only `BadImage`, no crash, no wait, no memory; later frames are never read."""

import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.bad_records import REASONS
from jaxmm.data.images import BadImage, decode
from jaxmm.data.pipeline import train_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tools.checking import check
from tests.data import image_mutants
from tests.data.image_mutants import KINDS, encode, mutant, outcome
from tests.pretrained import tiny

ROOT = Path(__file__).parents[2]
IMAGE_REASONS = {"empty", "not an image", "too large", "truncated", "corrupt"}


def process(*options, data=b""):
    """Run `image_mutants` in a process of its own: a decoder that crashes ends that one."""
    done = subprocess.run([sys.executable, "-m", "tests.data.image_mutants", *map(str, options)], cwd=ROOT, input=data,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr.decode()[-1000:])
    return json.loads(lines[-1])


@pytest.mark.parametrize("count, seed", [(60, 0), pytest.param(5000, 1, marks=pytest.mark.long)])
def test_mutated_images_are_read_or_refused(count, seed):
    """Pillow alone raises many types of errors for them, by which the mutations are seen to reach its decoders."""
    result = process("mutants", count, seed)
    for kind in KINDS:
        outcomes = result["ours"][kind]
        assert sum(outcomes.values()) == count and set(outcomes) <= IMAGE_REASONS | {"read"}, (kind, outcomes)
        assert len(outcomes) > 1 and outcomes.get("read", 0) < count, (kind, outcomes)
    assert len(set(result["pillow alone"]) - {"read", "UnidentifiedImageError", "OSError"}) >= 3, result


def test_bombs_take_no_memory():
    """The header or the length of a text decides. Decoded without limits, they take what they claim."""
    bombs = image_mutants.bombs()
    assert max(map(len, bombs.values())) < 2**20
    data = b"".join(base64.b64encode(bomb) + b"\n" for bomb in bombs.values())
    limited, unlimited = process("bombs", data=data)
    assert [reason for reason, _ in limited] == ["too large", "read", "too large"]
    assert max(growth for _, growth in limited) < 48 and min(growth for _, growth in unlimited) > 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Mutants of every format, one of each outcome that the format has, and four good images."""
    root = tmp_path_factory.mktemp("mutants")
    (root / "a").mkdir()
    outcomes = {}
    for kind in KINDS:
        extension = {"JPEG2000": "jp2", "TIFF": "tif"}.get(kind, kind.lower())
        for number in range(40):
            data = mutant(kind, number)
            if (reason := outcome(data)) not in outcomes.setdefault(kind, {}):
                outcomes[kind][reason] = root / "a" / f"{kind}{number}.{extension}"
                outcomes[kind][reason].write_bytes(data)
    for number in range(4):
        Image.new("RGB", (9, 8), (number, 0, 0)).save(root / "a" / f"good{number}.png")
    return root, {str(path): reason for found in outcomes.values() for reason, path in found.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_check_training_and_models_refuse_the_same_images(folder):
    root, expected = folder
    source, judged = open_source(f"folder:{root}"), []
    check(source, on_record=judged.append)
    assert {str(root / judgement.key): judgement.reason or "read" for judgement in judged
            if "good" not in judgement.key} == expected
    assert set(expected.values()) > {"read", "corrupt", "not an image"}
    batches = train_batches(source, DataConfig(batch_size=len(source), image=ImageConfig(size=4), max_bad=1.0), seed=0)
    batch = next(batches)
    batches.close()
    for drawn, fault in zip(batch["drawn"], batch["fault"], strict=True):
        reason = expected.get(str(root / source.key(int(drawn))), "read")
        assert reason == (REASONS[fault - 1] if fault else "read")
    model = tiny.vit()
    for path, reason in expected.items():
        try:
            model.prepare(path)
        except BadImage as error:
            assert error.reason == reason
        else:
            assert reason == "read"


def test_damaged_huffman_tables():
    """A table whose codes do not fit is refused. One with other values may decode to other pixels."""
    good = encode(Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)), "JPEG")
    tables = [at for at in range(len(good) - 1) if good[at:at + 2] == b"\xff\xc4"]
    assert len(tables) >= 2
    for at in tables:
        counts, length = at + 5, struct.unpack(">H", good[at + 2:at + 4])[0]
        for place in (counts, counts + 1, counts + 15):
            data = bytearray(good)
            data[place] = 255
            with pytest.raises(BadImage, match="corrupt"):
                decode(bytes(data))
        values = bytearray(good[counts + 16:at + 2 + length])
        random.Random(at).shuffle(values)
        data = good[:counts + 16] + bytes(values) + good[at + 2 + length:]
        assert outcome(data) in ("read", "corrupt", "truncated")


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_later_frames_of_an_animation_are_not_read(kind):
    """Their bytes are garbage, which whoever reads them notices."""
    first, others = Image.new("RGB", (5, 3), "red"), [Image.new("RGB", (5, 3), (0, i, 0)) for i in range(1, 200)]
    data = encode(first, kind, save_all=True, append_images=others)
    start = {"GIF": lambda: data.index(b"\x2c", data.index(b"\x2c") + 1) + 1, "PNG": lambda: data.index(b"fdAT") + 8}
    at = start[kind]()
    broken = data[:at] + b"\xff" * (len(data) - at - 12) + data[-12:]
    with pytest.raises((OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)):
        image = Image.open(io.BytesIO(broken))
        for number in range(200):
            image.seek(number)
            image.load()
    np.testing.assert_array_equal(np.asarray(decode(broken)), np.broadcast_to([255, 0, 0], (3, 5, 3)))


def test_a_tiff_whose_directories_go_round_in_a_circle():
    data = bytearray(encode(Image.new("RGB", (5, 3), "red"), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start:start + 2])[0]
    at = start + 2 + 12 * count
    data[at:at + 4] = struct.pack("<I", start)                      # the next directory is this one
    assert decode(bytes(data)).getpixel((4, 2)) == (255, 0, 0)


def test_the_same_seed_gives_the_same_mutants():
    assert [mutant(kind, 3) for kind in KINDS] == [mutant(kind, 3) for kind in KINDS]
    assert len({mutant("PNG", number) for number in range(50)} - set(image_mutants.originals("PNG"))) > 40
