"""Scenes: captions are true of the objects, pixels show them, the data set is complete and repeatable."""

import io
import itertools
import multiprocessing
import pickle
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmm.data import scenes
from jaxmm.data.scenes import COLORS, NOISE, SHAPES, Object, Scene, open_scenes
from jaxmm.data.scenes.language import _wrong

PHRASE = re.compile(rf"(?:(small|little|large|big) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
WHERE = re.compile(r"(left of|right of|above|over|below|under)")


def fake(shape, color, size, x, y):
    return Object(shape=shape, color=color, size=size, x=x, y=y, radius=0.1)


def is_true(text: str, objects) -> bool:
    """Return whether all that `text` says is true of the objects: an independent oracle."""
    def find(match):
        size = {"little": "small", "big": "large"}.get(match[1], match[1])
        return next((o for o in objects if (o.color, o.shape) == match.group(2, 3) and size in (None, o.size)), None)

    matches = list(PHRASE.finditer(text))
    named = [find(m) for m in matches]
    if not named or None in named or len(set(named)) != len(objects):
        return False
    for i, (before, after) in enumerate(itertools.pairwise(matches)):
        word = WHERE.search(text[before.end():after.start()])
        dx, dy = named[i].x - named[i + 1].x, named[i].y - named[i + 1].y
        holds = {"left of": dx < -0.1, "right of": dx > 0.1, "above": dy < -0.1, "over": dy < -0.1,
                 "below": dy > 0.1, "under": dy > 0.1}
        if word and not holds[word[1]]:
            return False
    if count := re.match(r"(one|two|three) (\w+): ", text):
        shapes = {o.shape for o in objects}
        if count[1] != ("one", "two", "three")[len(objects) - 1]:
            return False
        if count[2] != "shapes" and {count[2].removesuffix("s").removesuffix("se")} - {s.removesuffix("s") for s in
                                                                                      shapes}:
            return False
    if len(objects) == 1:
        rows, columns = re.search("top|bottom", text), re.search("left|right", text)
        o, place = objects[0], "corner" in text or re.search("in the middle|at the|on the", text)
        row, column = ("top", "middle", "bottom")[int(o.y * 3)], ("left", "middle", "right")[int(o.x * 3)]
        if place and (row, column) != (rows[0] if rows else "middle", columns[0] if columns else "middle"):
            return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tfds"))
    open_scenes("tiny/train", path)
    return path


@pytest.fixture(scope="module")
def made() -> list[Scene]:
    rng = random.Random(5)
    return [scenes.random_scene(rng) for _ in range(400)]


def rebuilt(record) -> tuple[Object, ...]:
    return tuple(Object(**o) for o in record["objects"])


def test_oracle_knows_true_from_false():
    one = [fake("cross", "red", "small", 0.2, 0.8)]
    two = [*one, fake("star", "blue", "large", 0.7, 0.75)]
    for text in ("a small red cross in the bottom left corner", "one cross: a little red cross", "a red cross"):
        assert is_true(text, one)
    for text in ("a small red cross at the bottom", "a big red cross", "a blue cross", "two crosses: a red cross", "x"):
        assert not is_true(text, one)
    assert is_true("a small red cross to the left of a big blue star", two)
    assert not is_true("a small red cross right of a large blue star", two)
    assert not is_true("a small red cross", two)


def test_captions_are_true_and_differ(made):
    rng = random.Random(1)
    for scene in made:
        texts = scenes.captions(scene, rng)
        assert len(set(texts)) == 5 and texts[0] == scenes.describe(scene)
        for text in texts:
            assert is_true(text, scene.objects), (text, scene)
        for text in texts[:4]:
            assert sum(bool(m[1]) for m in PHRASE.finditer(text)) >= len(scene.objects), text


def test_a_description_by_hand():
    star, square, heart = (fake("star", "orange", "large", 0.2, 0.3), fake("square", "blue", "small", 0.8, 0.35),
                           fake("heart", "pink", "small", 0.75, 0.8))
    assert scenes.describe(Scene(objects=(star, square, heart))) == (
        "a large orange star left of a small blue square, and a small pink heart below the blue square")
    assert scenes.describe(Scene(objects=(heart,))) == "a small pink heart in the bottom right corner"


def test_objects_are_apart_and_inside(made):
    assert Counter(len(s.objects) for s in made).keys() == {1, 2, 3}
    for scene in made:
        for i, a in enumerate(scene.objects):
            assert 1.1 * a.radius < a.x < 1 - 1.1 * a.radius and 1.1 * a.radius < a.y < 1 - 1.1 * a.radius
            for b in scene.objects[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
                assert (a.shape, a.color) != (b.shape, b.color)
    radius = {size: [o.radius for s in made for o in s.objects if o.size == size] for size in ("small", "large")}
    assert min(radius["large"]) > 1.5 * max(radius["small"])


@pytest.mark.parametrize("size", [32, 64, 175])
def test_pixels_are_the_objects(made, size):
    for scene in made[:60]:
        pixels = np.asarray(scenes.draw(scene, size))
        assert pixels.shape == (size, size, 3)
        for o in scene.objects:
            assert tuple(pixels[int(o.y * size), int(o.x * size)]) == COLORS[o.color]
        covered = (pixels.astype(int).min(-1) < 200).mean()      # the grounds are light, the shapes are not
        extent = sum((2 * o.radius) ** 2 for o in scene.objects)
        assert 0.15 * extent < covered < 1.3 * extent
        assert pixels[0, [0, -1]].min() >= 225 and pixels[-1, [0, -1]].min() >= 210


def test_shapes_differ_at_the_stored_size():
    pictures = [np.asarray(scenes.draw(Scene(objects=(fake(shape, "black", "small", 0.5, 0.5),)), 64), int)
                for shape in SHAPES]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert (abs(a - b).max(-1) > 100).sum() >= 12


def test_answers_are_right(made):
    rng, kinds, verdicts = random.Random(2), Counter(), Counter()
    for scene in made:
        for q in scenes.questions(scene, rng):
            kinds[q.kind] += 1
            objects = scene.objects
            words = q.question.rstrip("?").split()
            looks = [o for o in objects if f"{o.color} {o.shape}" in q.question]
            if q.kind in ("color", "shape"):
                (o,) = [o for o in objects if o.shape == words[-1] or f"{o.color} object" in q.question]
                assert q.answer == getattr(o, q.kind)
            elif q.kind == "size":
                assert q.answer == looks[0].size and len(looks) == 1
            elif q.kind == "count":
                what = " ".join(words[2:-2])
                count = sum(what in ("shapes", f"{o.shape}s", f"{o.shape}es", f"{o.color} objects", f"{o.size} shapes")
                            for o in objects)
                assert q.answer == str(count)
            elif q.kind == "relation":
                pair = q.question.removeprefix("is the ").rstrip("?")
                verdicts[q.answer] += 1
                assert (q.answer == "yes") == is_true(pair, looks)
            else:
                assert (q.answer == "yes") == bool(looks)
    assert set(kinds) == {"color", "shape", "size", "count", "relation", "exists"}
    assert 0.4 < verdicts["yes"] / verdicts.total() < 0.6


def test_web_captions_are_as_noisy_as_said(made):
    rng, kinds = random.Random(3), Counter()
    for scene in made * 5:
        text, kind = scenes.web_caption(scene, made, rng)
        kinds[kind] += 1
        assert is_true(text, scene.objects) == (kind == "correct"), (kind, text, scene)
        assert (scenes.plain(text) in scenes.true_captions(scene)) == (kind == "correct"), (kind, text, scene)
        if kind == "filename":
            assert re.search(r"\.(jpe?g|png|gif)$", text, re.IGNORECASE)
        if kind == "truncated":
            assert len(text.split()) < len(scenes.describe(scene).split()) and text == text.strip()
    assert sum(NOISE.values()) == pytest.approx(1)
    for kind, share in NOISE.items():
        assert kinds[kind] / kinds.total() == pytest.approx(share, abs=0.03)
    assert all(PHRASE.search(_wrong(scene, rng)) for scene in made)


def test_records(folder):
    source = open_scenes("tiny/train", folder)
    assert len(source) == 160 and source.name == "scenes:tiny/train" and source.classes is None
    keys = set()
    for i in range(0, 160, 7):
        record = source[i]
        keys.add(record["key"])
        picture = Image.open(io.BytesIO(record["image"]))
        assert picture.format == "PNG" and picture.size == (32, 32) and picture.mode == "RGB"
        objects = rebuilt(record)
        for o in objects:
            assert picture.getpixel((int(o.x * 32), int(o.y * 32))) == COLORS[o.color]
        assert all(is_true(text, objects) for text in record["texts"])
        assert record["texts"] == record["true_texts"] and record["noise"] == "correct" and record["clean"] is True
        assert len(record["questions"]) == len(record["answers"]) == len(record["question_kinds"]) >= 4
        assert all(isinstance(answers, tuple) for answers in record["answers"])
        largest = max(objects, key=lambda o: o.radius)
        assert source.names_largest(i, record["texts"][0])
        assert not source.names_largest(i, f"a {largest.shape} that is {largest.color}")
        assert all(source.is_true(i, text.replace(",", " , ").upper()) for text in record["texts"])
        assert not source.is_true(i, record["texts"][0].replace(largest.shape, "cube"))
    assert len(keys) == len(range(0, 160, 7))
    assert source[-1] == source[159]
    with pytest.raises(IndexError, match="160"):
        source[160]


def test_web_keeps_the_truth(folder):
    source = open_scenes("tiny/web", folder)
    records = [source[i] for i in range(len(source))]
    for record in records:
        assert len(record["texts"]) == 1 and len(record["true_texts"]) == 5
        assert record["clean"] == (record["noise"] == "correct") == is_true(record["texts"][0], rebuilt(record))
        assert all(is_true(text, rebuilt(record)) for text in record["true_texts"])
    assert {r["noise"] for r in records} == set(NOISE)


def test_no_scene_is_in_two_places(folder):
    counts = Counter(source[i]["true_texts"][0] for split in scenes.SPLITS
                   for source in [open_scenes(f"tiny/{split}", folder)] for i in range(len(source)))
    assert counts.total() == 300 and max(counts.values()) == 1


def test_held_out_images_do_not_depend_on_the_sizes_of_other_splits():
    from jaxmm.data.scenes.builder import Scenes, ScenesConfig, make_scenes

    small = make_scenes(ScenesConfig(name="a", val=12, test=0, train=9, web=0))
    other = make_scenes(ScenesConfig(name="b", val=12, test=7, train=30, web=3))
    assert small["val"] == other["val"] == make_scenes(Scenes.builder_configs["tiny"])["val"][:12]


def test_content_is_pinned():
    """A change here is a new version of the data set: raise `Scenes.VERSION`."""
    from jaxmm.data.scenes.builder import Scenes, make_scenes

    made = make_scenes(Scenes.builder_configs["tiny"])
    assert str(Scenes.VERSION) == "1.0.0"
    assert scenes.describe(made["val"][0]) == (
        "a large pink cross right of a large orange star, and a large green triangle right of the orange star")
    assert scenes.describe(made["web"][-1]) == "a small purple square left of a small green circle"
    assert np.asarray(scenes.draw(made["val"][0], 16)).sum() == pytest.approx(163_990, rel=1e-3)


def test_source_is_light_and_pickles(folder):
    source = open_scenes("tiny/val", folder)
    source[3]
    data = pickle.dumps(source)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again[3] == source[3] and again.fingerprint == source.fingerprint
    assert source.fingerprint != open_scenes("tiny/test", folder).fingerprint


def test_drawing_is_quiet(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = open_scenes("tiny/test")
    assert source[0]["key"] == "test-00000" and Path(source.folder).is_relative_to(tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "scenes" in err


def test_interrupted_drawing_is_never_taken_for_whole(tmp_path, monkeypatch):
    from jaxmm.data.scenes import builder

    drawn = 0

    def png(scene, size):
        nonlocal drawn
        drawn += 1
        if drawn > 30:
            raise KeyboardInterrupt
        return scenes.drawing.png(scene, size)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(builder, "png", png)
        open_scenes("tiny/val", str(tmp_path))
    version = tmp_path / "scenes" / "tiny" / "1.0.0"
    assert not version.exists()
    left = version.parent / "incomplete.ABCDEF_1.0.0"      # what a killed process leaves
    left.mkdir()
    (left / "scenes-val.array_record-00000-of-00001").write_bytes(b"half")
    assert len(open_scenes("tiny/val", str(tmp_path))) == 40
    assert version.exists() and not left.exists()


def test_damaged_copy_is_named(tmp_path):
    source = open_scenes("tiny/val", str(tmp_path))
    file = next(Path(source.folder).glob("scenes-val*"))
    file.write_bytes(file.read_bytes()[:70_000])
    with pytest.raises(ValueError, match=r"1\.0\.0 is not a complete copy of scenes .*remove that folder"):
        open_scenes("tiny/val", str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="remove that folder"):
        open_scenes("tiny/val", str(tmp_path))


def _open(folder: str) -> tuple[int, dict, bool]:
    source = open_scenes("tiny/web", folder)
    return len(source), source[7], "tensorflow" in sys.modules


def test_two_processes_at_once_without_tensorflow(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_open, [str(tmp_path)] * 2)
    assert first == second and first[0] == 80 and not first[2]
    assert not list(tmp_path.glob("scenes/tiny/incomplete*"))


@pytest.mark.parametrize("split", ["training", "", "tiny/", "huge/train", "train/tiny"])
def test_unknown_splits_are_refused(split, tmp_path):
    with pytest.raises(ValueError, match="expected one of"):
        open_scenes(split, str(tmp_path))
    assert not list(tmp_path.iterdir())
