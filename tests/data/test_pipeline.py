import io
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter

import grain
import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data import transforms
from jaxmm.data.bad_records import REASONS, FaultCounter
from jaxmm.data.base import DataError
from jaxmm.data.eval_pipeline import eval_batches, eval_texts
from jaxmm.data.images import decode
from jaxmm.data.pipeline import step_records, train_batches
from jaxmm.data.rows import text_id
from jaxmm.data.sources.registry import open_source

IMAGE = ImageConfig(size=16)
CONFIG = DataConfig(batch_size=6, image=IMAGE)


class Letters:
    """A tokenizer: the codes of the first 9 letters."""

    def __call__(self, texts):
        return np.array([[*map(ord, text[:9].ljust(9))] for text in texts], np.int32)

    def decode(self, ids):
        return "".join(map(chr, ids)).strip()


def png(seed):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """23 images in three classes."""
    for i in range(23):
        path = tmp_path / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    return open_source(f"folder:{tmp_path}")


@pytest.fixture
def captions(tmp_path):
    """11 records: i % 3 + 1 captions; 3 and 4 show the same image in different files; 5 says what 6 says."""
    lines = []
    for i in range(11):
        (tmp_path / f"{i}.png").write_bytes(png(3 if i == 4 else i))
        texts = ["One  Text" if i == 5 else "one text"] if i in (5, 6) else [f"text {i} {k}" for k in range(i % 3 + 1)]
        lines.append(json.dumps({"image": f"{i}.png", "captions": texts}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return open_source(f"captions:{tmp_path}/train.jsonl")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def replace(config, **changes):
    return DataConfig(**({"batch_size": config.batch_size, "image": config.image} | changes))


def test_every_record_once_an_epoch():
    drawn = np.concatenate([step_records(23, 6, 5, k) for k in range(23)])    # 6 epochs of 23
    epochs = drawn.reshape(6, 23)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(23), (6, 23)))
    assert len({epoch.tobytes() for epoch in epochs}) == 6
    # neighbouring seeds do not share their epochs
    assert step_records(23, 23, 6, 0).tobytes() not in {epoch.tobytes() for epoch in epochs}
    np.testing.assert_array_equal(step_records(1, 3, 0, 7), [0, 0, 0])
    # one record at a time is the same order
    np.testing.assert_array_equal(drawn[:50], np.concatenate([step_records(23, 1, 5, k) for k in range(50)]))


def test_every_record_once_an_epoch_of_a_large_source():
    length = 2**16 + 3
    epochs = [step_records(length, length, 5, epoch) for epoch in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(length))
        assert abs(np.corrcoef(epoch, np.arange(length))[0, 1]) < 0.02
    assert (epochs[0] != epochs[1]).mean() > 0.99
    across = step_records(length, 10, 5, length // 10)
    np.testing.assert_array_equal(across, [*epochs[0][-9:], epochs[1][0]])


def test_a_batch_is_what_its_records_say(folder):
    batch = next(train_batches(folder, CONFIG, seed=5))
    drawn = step_records(23, 6, 5, 0)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "image": ((6, 16, 16, 3), "uint8"), "image_id": ((6, 2), "int32"), "label": ((6,), "int32"),
        "index": ((6,), "int32"), "drawn": ((6,), "int32"), "fault": ((6,), "int32")}
    np.testing.assert_array_equal(batch["index"], drawn)
    np.testing.assert_array_equal(batch["drawn"], drawn)
    np.testing.assert_array_equal(batch["label"], [folder[i]["label"] for i in drawn.tolist()])
    assert not batch["fault"].any()
    for row, index in enumerate(drawn.tolist()):
        image = transforms.train_image(decode(folder[index]["image"]), IMAGE, np.random.default_rng((5, row, 0)))
        np.testing.assert_array_equal(batch["image"][row], image)


def test_augmentation_changes_from_epoch_to_epoch(folder):
    batches = take(train_batches(folder, replace(CONFIG, batch_size=23), seed=5), 2)
    first, second = (batch["image"][np.argsort(batch["index"])] for batch in batches)
    assert (first != second).any((1, 2, 3)).all()


def test_workers_hosts_and_restarts_do_not_change_the_batches(folder, tmp_path):
    """Bad records are replaced by the same others whatever loads them, and change nothing in the rows beside them."""
    config = replace(CONFIG, max_bad=1.0)
    unspoilt = take(train_batches(folder, config, seed=5), 4)
    bad = spoil(folder, tmp_path)
    expected = take(train_batches(folder, config, seed=5), 7)
    assert {int(drawn) for batch in expected[:4] for drawn in batch["drawn"][batch["fault"] > 0]} == set(bad)
    for batch, before in zip(expected, unspoilt, strict=False):
        good = batch["fault"] == 0
        assert_same({name: value[good] for name, value in batch.items()},
                    {name: value[good] for name, value in before.items()})

    for shares in (((0, 0), (1, 0)), ((0, 1), (1, 3))):             # hosts and their workers
        hosts = [train_batches(folder, replace(config, workers=workers), seed=5, shard=(host, 2))
                 for host, workers in shares]
        for host in hosts:
            host.set_state({"step": 3})
        for theirs, *parts in zip(expected[3:], *(take(host, 4) for host in hosts), strict=True):
            assert any(batch["fault"].any() for batch in expected[3:])
            assert_same({name: np.concatenate([part[name] for part in parts]) for name in theirs}, theirs)


def test_hosts_share_a_batch(captions):
    full = train_batches(captions, CONFIG, Letters(), seed=5)
    hosts = [train_batches(captions, CONFIG, Letters(), seed=5, shard=(host, 2)) for host in range(2)]
    for _ in range(3):
        parts = [next(host) for host in hosts]
        assert_same(next(full), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    with pytest.raises(DataError, match="a batch of 6 does not divide over host 0 of 4"):
        train_batches(captions, CONFIG, seed=5, shard=(0, 4))


def test_state_resumes_exactly_and_is_json(folder):
    iterator = train_batches(folder, CONFIG, seed=5)
    take_three = [next(iterator) for _ in range(3)]
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(3)]
    iterator.set_state(state)                                             # back
    for batch in rest:
        assert_same(next(iterator), batch)
    other = train_batches(folder, CONFIG, seed=5)
    assert isinstance(other, grain.DatasetIterator)
    other.set_state(state)
    assert_same(next(other), rest[0])
    other.set_state(state | {"step": 10**9})                              # at once, however far
    assert next(other)["image"].shape == take_three[0]["image"].shape


def test_state_of_other_data_is_refused(folder, tmp_path):
    state = train_batches(folder, CONFIG, seed=5).get_state()
    with pytest.raises(DataError, match="seed was 5 and is 6"):
        train_batches(folder, CONFIG, seed=6).set_state(state)
    with pytest.raises(DataError, match="batch_size was 6 and is 3"):
        train_batches(folder, replace(CONFIG, batch_size=3), seed=5).set_state(state)
    (tmp_path / "class0" / "new.png").write_bytes(png(99))
    changed = open_source(folder.name)
    with pytest.raises(DataError, match="is not what this run began with: records was 23 and is 24; fingerprint"):
        train_batches(changed, CONFIG, seed=5).set_state(state)


def test_texts_are_drawn_from_all_captions(captions):
    drawn_texts = {}
    for batch in take(train_batches(captions, CONFIG, Letters(), seed=5), 40):
        for row, index in enumerate(batch["index"].tolist()):
            text = Letters().decode(batch["tokens"][row])
            assert text in captions.texts(index)
            drawn_texts.setdefault(index, set()).add(text)
            np.testing.assert_array_equal(batch["text_id"][row], text_id(text))
    assert drawn_texts == {i: set(captions.texts(i)) for i in range(11)}


def test_several_captions_of_an_image(captions):
    """As many as asked for, none twice before all were drawn; restarts and hosts do not change them."""
    config, drawn = replace(CONFIG, captions=2), {}
    batches = take(train_batches(captions, config, Letters(), seed=5), 40)
    for batch in batches:
        assert batch["tokens"].shape == (6, 2, 9) and batch["text_id"].shape == (6, 2, 2)
        for row, index in enumerate(batch["index"].tolist()):
            texts = tuple(map(Letters().decode, batch["tokens"][row]))
            assert set(texts) <= set(captions.texts(index)) and len(set(texts)) == min(2, len(captions.texts(index)))
            drawn.setdefault(index, set()).add(texts)
            np.testing.assert_array_equal(batch["text_id"][row], [text_id(text) for text in texts])
    assert [len(drawn[i]) for i in range(5)] == [1, 2, 6, 1, 2]      # of one, two and three captions, ordered pairs
    iterator = train_batches(captions, config, Letters(), seed=5)
    iterator.set_state({"step": 3})
    assert_same(take(iterator, 1)[0], batches[3])
    hosts = [train_batches(captions, config, Letters(), seed=5, shard=(host, 2)) for host in range(2)]
    parts = [next(host) for host in hosts]
    assert_same(batches[0], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    one, alone = (next(train_batches(captions, replace(CONFIG, batch_size=11, **fields), Letters(), seed=5))
                  for fields in ({}, {"captions": 1}))
    assert_same(one, alone)


ORIGINS = [("web", "web", "synthetic", "human"), ("web",), ("human",), None]


@pytest.fixture
def mixed_origins(tmp_path):
    """Four records: texts of three origins, of one, of one without a weight, and of unknown origin."""
    lines = []
    for i, origins in enumerate(ORIGINS):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        texts = [f"{i}{k} {origin}" for k, origin in enumerate(origins or ("x", "y"))]
        lines.append(json.dumps({"image": f"{i}.png", "captions": texts} | ({"origins": origins} if origins else {})))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return open_source(f"captions:{tmp_path}/train.jsonl")


def test_texts_are_drawn_by_the_weights_of_their_origins(mixed_origins):
    config = replace(CONFIG, batch_size=8, captions=3, max_bad=1.0,
                     origins=(("synthetic", 3.0), ("web", 1.0), ("human", 0.0)))
    batches = take(train_batches(mixed_origins, config, Letters(), seed=5), 100)
    texts = {i: [] for i in range(4)}
    for batch in batches:
        for index, tokens in zip(batch["index"].tolist(), batch["tokens"], strict=True):
            texts[index].append(tuple(map(Letters().decode, tokens)))
    faults = {fault for batch in batches for drawn, fault in zip(batch["drawn"], batch["fault"], strict=True)
              if drawn == 2}
    assert faults == {1 + REASONS.index("no text")} and not texts[2]
    shares = Counter(text for row in texts[0] for text in row)
    assert set(shares) == {"00 web", "01 web", "02 synthe"} and set(texts[1]) == {("10 web",) * 3}
    np.testing.assert_allclose([shares["02 synthe"], shares["00 web"]], np.array([0.75, 0.125]) * shares.total(),
                               rtol=0.15)
    for row in texts[0]:
        web = [text for text in row if "web" in text]
        assert len(set(web)) == min(len(web), 2)
    assert {frozenset(row) for row in texts[3]} == {frozenset(("30 x", "31 y"))}
    again = train_batches(mixed_origins, config, Letters(), seed=5)
    again.set_state({"step": 2})
    assert_same(take(again, 1)[0], batches[2])
    hosts = [next(train_batches(mixed_origins, config, Letters(), seed=5, shard=(host, 2))) for host in range(2)]
    assert_same(batches[0], {name: np.concatenate([part[name] for part in hosts]) for name in hosts[0]})


def test_ids_are_equal_where_the_image_or_the_words_are(captions):
    batch = next(eval_batches(captions, CONFIG, 11, Letters()))
    same_picture = (batch["image_id"][:, None] == batch["image_id"][None]).all(-1)
    same_words = (batch["text_id"][:, None] == batch["text_id"][None]).all(-1)
    for same, pair in ((same_picture, (3, 4)), (same_words, (5, 6))):
        expected = np.eye(11, dtype=bool)
        expected[pair], expected[pair[::-1]] = True, True
        np.testing.assert_array_equal(same, expected)
    assert (text_id(" A\tb ") == text_id("a B")).all()


def spoil(folder, tmp_path, indices=(2, 7, 11)):
    """One damaged, one empty, one missing."""
    for index, content in zip(indices, (b"<html>", b"", None), strict=True):
        path = tmp_path / folder.key(index)
        path.unlink() if content is None else path.write_bytes(content)
    return dict(zip(indices, ("not an image", "empty", "unreadable"), strict=True))


def test_bad_records_are_replaced_and_counted(folder, tmp_path):
    bad = spoil(folder, tmp_path)
    config = replace(CONFIG, batch_size=23, max_bad=0.2)
    batches = take(train_batches(folder, config, seed=5), 3)
    faults = FaultCounter(folder, config.max_bad, least=23)
    for batch, again in zip(batches, take(train_batches(folder, config, seed=5), 3), strict=True):
        assert_same(batch, again)
        faults.update(batch)
        assert set(batch["drawn"]) == set(range(23)) and not set(batch["index"]) & set(bad)
        for drawn, index, fault, label in zip(*(batch[n] for n in ("drawn", "index", "fault", "label")), strict=True):
            assert fault == (1 + REASONS.index(bad[drawn]) if drawn in bad else 0)
            assert (index == drawn) == (fault == 0) and label == folder.labels[index]
    assert faults.counts == {reason: 3 for reason in bad.values()} and (faults.records, faults.bad) == (69, 9)
    assert set(faults.examples[:3]) == {(folder.key(i), reason) for i, reason in bad.items()}
    strict = FaultCounter(folder, 0.1, least=23)
    with pytest.raises(DataError, match=r"3 of 23 records were bad \(1 .*data.max_bad allows a share of 0.1"):
        strict.update(batches[0])
    lenient = FaultCounter(folder, 0.1, least=24)
    lenient.update(batches[0])
    assert lenient.bad == 3


def test_missing_captions_and_labels_are_faults(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    lines = [{"image": "0.png", "caption": "x"}, {"image": "0.png", "caption": " "}, {"image": "0.png"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(f"captions:{tmp_path}/a.jsonl")
    batch = next(train_batches(source, replace(CONFIG, batch_size=3), Letters(), seed=0))
    assert (batch["index"] == 0).all()
    np.testing.assert_array_equal(batch["fault"][np.argsort(batch["drawn"])], [0, *[1 + REASONS.index("no text")] * 2])
    assert not next(train_batches(source, CONFIG, seed=0))["fault"].any()  # without a tokenizer they do


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_broken_records_ends_with_one_message(tmp_path, workers):
    (tmp_path / "a").mkdir()
    for i in range(5):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(b"no picture")
    source = open_source(f"folder:{tmp_path}")
    message = r"50 records in a row cannot be used; the last was a/\d.jpg: not an image"
    with pytest.raises(DataError, match=message) as error:
        next(train_batches(source, replace(CONFIG, workers=workers), seed=0))
    assert error.value.__cause__ is None and not getattr(error.value, "__notes__", None)
    with pytest.raises(DataError, match=r"5 of 5 records were bad \(5 not an image; first a/0.jpg"):
        list(eval_batches(source, CONFIG, 2))


def test_eval_batches_are_in_order_and_filled_up(folder, tmp_path):
    bad = spoil(folder, tmp_path)
    batches = list(eval_batches(folder, CONFIG, 10))
    assert [len(batch["mask"]) for batch in batches] == [10, 10, 10]
    full = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.testing.assert_array_equal(full["index"], [*range(23), *[0] * 7])
    np.testing.assert_array_equal(full["mask"], [i < 23 and i not in bad for i in range(30)])
    np.testing.assert_array_equal(full["fault"], [1 + REASONS.index(bad[i]) if i in bad else 0 for i in range(30)])
    for i in range(30):
        expected = transforms.eval_image(decode(folder[i]["image"]), IMAGE) if full["mask"][i] else 0
        np.testing.assert_array_equal(full["image"][i], np.broadcast_to(expected, (16, 16, 3)))
        assert full["label"][i] == (folder.labels[i] if full["mask"][i] else 0)


def test_eval_batches_of_hosts(captions):
    parts = [list(eval_batches(captions, CONFIG, 8, Letters(), shard=(host, 2))) for host in range(2)]
    for full, *shares in zip(eval_batches(captions, CONFIG, 8, Letters()), *parts, strict=True):
        assert_same(full, {name: np.concatenate([share[name] for share in shares]) for name in full})


def test_eval_texts_are_all_captions(captions, tmp_path):
    for i in range(11):
        (tmp_path / f"{i}.png").unlink()                                  # pictures are not read
    batches = list(eval_texts(captions, Letters(), 4))
    assert all(batch["tokens"].shape == (4, 9) and batch["tokens"].dtype == np.int32 for batch in batches)
    full = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    owners = [i for i in range(11) for _ in captions.texts(i)]
    np.testing.assert_array_equal(full["mask"], np.arange(len(full["mask"])) < len(owners))
    np.testing.assert_array_equal(full["owner"][full["mask"]], owners)
    texts = [text for i in range(11) for text in captions.texts(i)]
    assert [Letters().decode(row) for row in full["tokens"][full["mask"]]] == texts
    np.testing.assert_array_equal(full["text_id"][full["mask"]], np.stack([*map(text_id, texts)]))


def test_a_program_that_ends_without_closing_is_quiet(folder):
    """Workers, shared memory and Grain's own clean-up leave nothing on the screen and no process behind."""
    program = textwrap.dedent(f"""
        from jaxmm.config import DataConfig, ImageConfig
        from jaxmm.data.pipeline import train_batches
        from jaxmm.data import open_source

        if __name__ == "__main__":
            config = DataConfig(batch_size=3, workers=1, image=ImageConfig(size=8))
            batches = train_batches(open_source({folder.name!r}), config, seed=0)
            batch = next(batches)
            print(batch["image"].shape)
    """)
    path = os.path.join(folder.root, "program.py")
    with open(path, "w") as file:
        file.write(program)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(3, 8, 8, 3)\n", "")
