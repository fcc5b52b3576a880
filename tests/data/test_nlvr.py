"""Sentences about two images: both layouts of files, batches, and what chance exchanges in training."""

import json
import pickle

import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.base import DataError
from jaxmm.data.eval_pipeline import eval_batches
from jaxmm.data.pipeline import train_batches
from jaxmm.data.rows import image_id
from jaxmm.data.sources.nlvr import swap_left_right
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.context import thumbnail
from tests.data.test_sources import png, write

PLAIN = ImageConfig(size=4, train_crop="squash", eval_crop="squash", flip=False)
SIDES = {"the left is dark": "the right is dark", "two dogs": "two dogs"}
"""Sentences as they are read, and with left and right swapped."""


class Names:
    """A tokenizer whose one token says which of the sentences of `SIDES` a text is."""

    known = (*SIDES, "the right is dark", "")

    def __call__(self, texts):
        return np.array([[self.known.index(text)] for text in texts], np.int32)


def pairs(folder, layout="", count=6):
    """Write NLVR2's own lines: the first image of pair i has value i, the second 100 + i."""
    lines = []
    for i in range(count):
        for k in (0, 1):
            write(folder / layout / f"dev-{i}-0-img{k}.png", png(i + 100 * k))
        sentence = ("The LEFT is dark.", "Two dogs...")[i % 2]
        lines.append({"identifier": f"dev-{i}-0-1", "sentence": sentence, "label": ("True", "False")[i % 2],
                      "directory": 7})
    return write(folder / "data/dev.json", "\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("layout", ["data", "data/images", "images/dev", "dev", "images/7", "images/dev/7"])
def test_nlvr2s_own_files(tmp_path, layout):
    source = open_source(f"nlvr:{pairs(tmp_path, layout)}")
    assert len(source) == 6 and source.classes == ("False", "True")
    record = source[2]
    assert record["image"] == (png(2), png(102)) and record["texts"] == ("the left is dark",) and record["label"] == 1
    assert source[1]["label"] == 0 and source.texts(1) == ("two dogs",)
    assert len({source.key(i) for i in range(6)}) == 6
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_blips_list(tmp_path):
    rows = [{"sentence": "A cat", "label": label, "images": ["train/a.png", f"train/{i}.png"]}
            for i, label in enumerate(("True", "False", True, False))]
    for i, name in enumerate(("a", "0", "1", "2", "3")):
        write(tmp_path / f"nlvr/train/{name}.png", png(i))
    source = open_source(f"nlvr:{write(tmp_path / 'annotations/nlvr_train.json', json.dumps(rows))}")
    assert [source[i]["label"] for i in range(4)] == [1, 0, 1, 0]
    assert source[2]["image"] == (png(0), png(3))
    assert len({tuple(image_id(source[i])) for i in range(4)}) == 4      # that of both, of which one is the same


@pytest.mark.parametrize("text, message", [
    ("[{", "dev.json:1 is not JSON"),
    ('{"identifier": "a-0", "sentence": "x", "label": "True"}\n{', "dev.json:2 is not JSON"),
    ('{"identifier": "a-0", "sentence": "x", "label": "yes"}', "dev.json:1: expected an object with `sentence`"),
    ('[{"images": ["a.png"], "sentence": "x", "label": true}]', "entry 0: expected an object with"),
    ('[3]', "entry 0 is int; expected an object"),
    ("[]", "is empty"),
    ('{"identifier": "a-0-0-0", "sentence": "x", "label": "True"}', "'a-0-0-img0.png', the first image, none is"),
])
def test_bad_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_source(f"nlvr:{write(tmp_path / 'dev.json', text)}")


def test_batches(tmp_path):
    """The red channel identifies the image."""
    source = open_source(f"nlvr:{pairs(tmp_path, 'dev')}")
    config = DataConfig(batch_size=6, image=PLAIN)
    (first, second) = eval_batches(source, config, 4, Names())
    assert first["image"].shape == second["image"].shape == (4, 2, 4, 4, 3)
    np.testing.assert_array_equal(first["image"][:, :, 0, 0, 0], [[i, 100 + i] for i in range(4)])
    assert second["mask"].tolist() == [True, True, False, False] and not second["image"][2:].any()
    np.testing.assert_array_equal(first["tokens"][:, 0], [0, 1, 0, 1])
    iterator, turned = train_batches(source, config, Names(), seed=3), []
    for _ in range(20):
        batch = next(iterator)
        red = batch["image"][:, :, 0, 0, 0].astype(int)
        turned += (red[:, 0] >= 100).tolist()
        np.testing.assert_array_equal(np.sort(red, axis=1), np.stack([batch["index"], batch["index"] + 100], axis=1))
        np.testing.assert_array_equal(batch["label"], 1 - batch["index"] % 2)
        expected = np.where(batch["index"] % 2 == 1, 1, np.where(red[:, 0] >= 100, 2, 0))
        np.testing.assert_array_equal(batch["tokens"][:, 0], expected)
    iterator.close()
    assert 40 < sum(turned) < 80


def test_left_and_right_are_swapped():
    assert swap_left_right("the left, left-hand one is right of leftovers") == (
        "the right, right-hand one is left of leftovers")


def test_a_image_that_is_broken_spoils_its_pair(tmp_path):
    source = open_source(f"nlvr:{pairs(tmp_path, 'dev')}")
    write(tmp_path / "dev/dev-3-0-img1.png", b"no picture")
    (batch,) = eval_batches(source, DataConfig(image=PLAIN), 6, Names())
    assert batch["mask"].tolist() == [True, True, True, False, True, True]


def test_both_are_shown_side_by_side(tmp_path):
    shown = thumbnail(open_source(f"nlvr:{pairs(tmp_path, 'dev')}"), 1)
    assert shown.shape == (3, 10, 3)
    np.testing.assert_array_equal(shown[0, :, 0], [1] * 5 + [101] * 5)
