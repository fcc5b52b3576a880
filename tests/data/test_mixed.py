"""Mixed sources: weights, and which images of two parts are the same."""

import io
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxmm.data import DataError, open_source
from jaxmm.data.rows import image_id
from jaxmm.data.tools.importing import import_source
from tests.data.test_sources import png, write


def captions(folder, name, values, **more):
    """A file of captions whose image i is of value `values[i]`."""
    for value in values:
        write(folder / f"{value}.png", png(value))
    lines = [{"image": f"{value}.png", "caption": f"{name} {value}"} | {key: ids[i] for key, ids in more.items()}
             for i, value in enumerate(values)]
    return f"captions:{write(folder / f'{name}.jsonl', chr(10).join(map(json.dumps, lines)))}"


class Numbered(tfds.core.GeneratorBasedBuilder):
    """A data set whose ids are 0, 1, 2 and so on, as many are published."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}      # noqa: RUF012 - nothing is downloaded
    values = ()

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"), "image_id": np.int64,
            "caption": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, value in enumerate(self.values):
            yield i, {"image": io.BytesIO(png(value)), "image_id": i, "caption": str(value)}


def numbered(folder, values):
    """The spec of `Numbered`, prepared in `folder`."""
    tfds.display_progress_bar(False)
    builder = Numbered(data_dir=folder, file_format="array_record")
    builder.values = values
    builder.download_and_prepare(download_dir=folder / "downloads")
    return f"tfds:{builder.data_dir}:train"


def ids(source):
    return [tuple(image_id(source[i]).tolist()) for i in range(len(source))]


def test_each_part_counts_as_often_as_its_weight(tmp_path):
    parts = captions(tmp_path, "a", [1, 2]), captions(tmp_path, "b", [3, 4, 5])
    source = open_source(f"{parts[0]} + 3 * {parts[1]}")
    assert [source.texts(i) for i in range(len(source))] == [("a 1",), ("a 2",), *[("b 3",), ("b 4",), ("b 5",)] * 3]
    assert source.key(10) == source[10]["key"] == open_source(parts[1]).key(2) and source[10]["image"] == png(5)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    assert source.fingerprint != open_source(f"{parts[0]} + 2*{parts[1]}").fingerprint
    assert [open_source(f"2*{parts[0]}")[i]["texts"] for i in range(4)] == [("a 1",), ("a 2",)] * 2


def test_ids_of_two_data_sets_do_not_meet(tmp_path):
    specs = [numbered(tmp_path / "x", [1, 2]), numbered(tmp_path / "y", [3, 4])]
    records = [open_source(spec)[0]["image_id"] for spec in specs]
    assert records[0] == records[1] == "0"
    assert len(set(ids(open_source(" + ".join(specs))))) == 4
    files = [captions(tmp_path / name, name, values, image_id=["0", "1"])
             for name, values in (("a", [5, 6]), ("b", [7, 8]))]
    assert len(set(ids(open_source(" + ".join([*files, *specs]))))) == 8


def test_ids_within_a_data_set_are_the_same_in_each_part(tmp_path):
    spec = numbered(tmp_path, [1, 2, 3])
    first, second, *_, last = ids(open_source(f"{spec}[:2] + {spec}"))
    assert len(set(ids(open_source(f"{spec}[:2] + {spec}")))) == 3 and first != second
    assert last == ids(open_source(f"{spec}[2:] + {spec}[:1]"))[0]
    repeated = ids(open_source(f"2*{spec}"))
    assert repeated[:3] == repeated[3:]


def test_digests_of_the_pixels_are_the_same_in_any_data_set(tmp_path):
    for name, values in (("a", [1, 2]), ("b", [2, 3])):
        import_source(open_source(captions(tmp_path, name, values)), tmp_path / name)
    specs = [f"tfds:{tmp_path / name}:train" for name in "ab"]
    mixed = ids(open_source(" + ".join(specs)))
    assert mixed[1] == mixed[2] and len(set(mixed)) == 3
    assert mixed == [*ids(open_source(specs[0])), *ids(open_source(specs[1]))]


@pytest.mark.parametrize("spec, message", [
    ("0*digits:test", "the weight of '0.digits:test' is 0; expected 1 or more"),
    ("digits:test + {captions}", "has other classes or another number of images per record than 'digits:test'"),
    ("{vqa} + {captions}", "cannot be mixed with others"), ("digits:test + digits:val", "unknown split 'val'"),
])
def test_what_cannot_be_mixed(tmp_path, spec, message):
    made = {"captions": captions(tmp_path, "a", [1]), "vqa": "vqa:" + str(write(tmp_path / "q.json", json.dumps(
        [{"image": "1.png", "question": "what?", "answer": "red"}])))}
    with pytest.raises(DataError, match=message.replace("+", r"\+")):
        open_source(spec.format(**made))


def test_notes_of_all_parts(tmp_path):
    write(tmp_path / "a/1.png", png(1))
    write(tmp_path / "a.jsonl", '{"image": "a/1.png", "caption": "x"}\n{"image": "a/1.png", "caption": "y"}\n{')
    source = open_source(f"2*captions:{tmp_path}/a.jsonl + captions:{tmp_path}/a.jsonl")
    assert source.notes == (f"captions:{tmp_path}/a.jsonl: 1 of 3 rows cannot be read",) * 2
