"""The data set `scenes`: images of coloured shapes with known content, drawn at first use.

`Scene` and `draw` make images of any size, `captions`, `questions` and `web_caption` their texts. `open_scenes` opens
the prepared data set: splits `train`, `val`, `test`, and `web`, whose captions are as noisy as those of a web crawl.
"""

import hashlib
import os
import re
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from jaxmm.data.base import DataError, Record, Source
from jaxmm.data.scenes.drawing import COLORS, SHAPES, SIZES, Object, Scene, cell, draw, random_scene, relation
from jaxmm.data.scenes.grading import nearest_look
from jaxmm.data.scenes.language import NOISE, Question, captions, describe, plain, questions, true_captions, web_caption
from jaxmm.data.sources.shards import Slice

__all__ = ["COLORS", "NOISE", "SHAPES", "SIZES", "Object", "Question", "Scene", "ScenesSource", "captions",
           "cell", "describe", "draw", "nearest_look", "open_scenes", "plain", "prepare", "questions", "random_scene",
           "relation", "scene_of", "true_captions", "web_caption"]

SPLITS = ("train", "val", "test", "web")
_SLICE = re.compile(r"(.*?)(?:\[(\d*):(\d*)\])?", re.DOTALL)


class ScenesSource(Source):
    """A split of a prepared data set. It consists of paths only and opens its files at the first read of each process.

    A record has `key`, `image` (PNG bytes), `image_id`, `texts` (of `web`: the one noisy caption), `true_texts`
    (five true captions, the first of them the full description), `noise` (a key of `NOISE`), `clean`,
    `questions`, `question_kinds` and `answers` (all three of one length; each answer is a tuple, as in sources with
    several answers) and `objects` (dicts with `shape`, `color`, `size`, `x`, `y`, `radius`).
    """

    grades_captions = grades_images = True

    def __init__(self, folder: str, split: str, name: str, length: int):
        self.folder, self.split, self.name, self._length = folder, split, name, length

    @property
    def fingerprint(self) -> str:
        """A digest of configuration, version, split and size: the content of a version never changes."""
        config, version = Path(self.folder).parts[-2:]
        return hashlib.sha256(f"scenes {config} {version} {self.split} {self._length}".encode()).hexdigest()

    @cached_property
    def _reader(self) -> Any:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_reader"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Read one record."""
        if not -self._length <= index < self._length:
            raise IndexError(f"record {index} of {self.name}, which has {self._length}")
        row = self._reader[index % self._length]
        asked, objects = row["questions"], row["objects"]
        return {
            "key": row["key"].decode(),
            "image": row["image"],
            "image_id": f"scenes-{row['key'].decode()}",
            "texts": tuple(t.decode() for t in row["texts"]),
            "true_texts": tuple(t.decode() for t in row["true_texts"]),
            "noise": row["noise"].decode(),
            "clean": bool(row["clean"]),
            "questions": tuple(t.decode() for t in asked["question"]),
            "question_kinds": tuple(t.decode() for t in asked["kind"]),
            "answers": tuple((t.decode(),) for t in asked["answer"]),
            "objects": tuple(
                {name: value.decode() if isinstance(value, bytes) else float(value)
                 for name, value in zip(objects, values, strict=True)}
                for values in zip(*objects.values(), strict=True)),
        }

    def is_true(self, index: int, caption: str) -> bool:
        """Return whether `caption` is one of the `true_captions` of image `index`."""
        return plain(caption) in true_captions(scene_of(self[index]))

    def names_largest(self, index: int, caption: str) -> bool:
        """Return whether `caption` names colour and shape of the largest object of image `index`."""
        largest = max(self[index]["objects"], key=lambda o: o["radius"])
        return f"{largest['color']} {largest['shape']}" in caption

    def shows_largest(self, index: int, images: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return whether `images` show the largest object's colour, and its shape, in `part` (see `nearest_look`)."""
        scene = scene_of(self[index])
        largest = max(scene.objects, key=lambda o: o.radius)
        looks = nearest_look(scene, largest, images, part)
        return None if looks is None else tuple(np.array([look[i] == own for look in looks], bool)
                                                for i, own in enumerate((largest.color, largest.shape)))


def scene_of(record: dict[str, Any]) -> Scene:
    """Return the scene of a record of `ScenesSource`, without its background."""
    return Scene(objects=tuple(Object(**fields) for fields in record["objects"]))


def prepare(config: str = "default", data_dir: str | None = None) -> Any:
    """Return the TFDS builder of `scenes/config`; draw the data set first if it does not exist.

    Processes that call this at the same time wait for the first. Files that a killed process left are removed.
    """
    import tensorflow_datasets as tfds

    from jaxmm.data.scenes.builder import Scenes

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    if config not in Scenes.builder_configs:
        raise DataError(f"scenes has no configuration {config!r}; expected one of "
                        f"{', '.join(Scenes.builder_configs)}")
    builder = Scenes(config=config, data_dir=data_dir, file_format="array_record")
    if not tfds.core.Path(builder.data_dir).exists():
        if "://" in builder.data_dir:      # a bucket has no locks
            raise DataError(f"{builder.data_dir} does not exist; draw scenes into a local data_dir and copy it")
        folder = Path(builder.data_dir)      # TFDS draws into another beside it and renames that when it is complete
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "prepare.lock"):
            for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(left)
            tfds.display_progress_bar(False)
            try:
                with tempfile.TemporaryDirectory() as nothing:      # for downloads, of which there are none
                    builder.download_and_prepare(download_dir=nothing)
            finally:
                tfds.display_progress_bar(True)
        builder = Scenes(config=config, data_dir=data_dir, file_format="array_record")
    return builder


def open_spec(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Open the source `scenes:SPLIT`."""
    return open_scenes(location, data_dir)


def open_scenes(split: str, data_dir: str | None = None) -> Source:
    """Open `train`, `val`, `test` or `web`, or such as `train[:400]`; `tiny/train` and so on are small, for tests.

    At the first use the data set is drawn: in `data_dir`, else `TFDS_DATA_DIR`, else the default folder of TFDS.
    """
    path, first, last = _SLICE.fullmatch(split).groups()
    config, _, name = path.rpartition("/")
    if name not in SPLITS:
        raise DataError(f"scenes has no split {split!r}; expected one of {', '.join(SPLITS)}, or some of their "
                        "records, such as train[:400]")
    builder = prepare(config or "default", data_dir)
    info = builder.info.splits.get(name)
    try:
        source = ScenesSource(str(builder.data_dir), name, f"scenes:{path}", info.num_examples)
        source[-1]
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{builder.data_dir} is not a complete copy of scenes ({error}); remove that folder, "
                        "and it will be drawn again") from error
    if path == split:
        return source
    start, stop, _ = slice(*(int(end) if end else None for end in (first, last))).indices(len(source))
    return Slice(source, start, max(start, stop))
