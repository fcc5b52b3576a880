"""`scenes`: pictures of coloured shapes whose truth is known, drawn on first use.

`Scene` and `draw` make pictures of any size, `captions`, `questions` and `web_caption` their words, and
`open_scenes` reads the prepared data set: splits `train`, `val`, `test`, and `web`, whose captions are as noisy as
a crawl's.
"""

import hashlib
import os
import re
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from jaxmm.data.base import DataError, Source
from jaxmm.data.scenes.drawing import COLORS, SHAPES, SIZES, Object, Scene, cell, draw, random_scene, relation
from jaxmm.data.scenes.language import NOISE, Question, captions, describe, plain, questions, true_captions, web_caption
from jaxmm.data.sources.shards import Slice

__all__ = ["COLORS", "NOISE", "SHAPES", "SIZES", "Object", "Question", "Scene", "ScenesSource", "captions",
           "cell", "describe", "draw", "open_scenes", "plain", "prepare", "questions", "random_scene", "relation",
           "scene_of", "true_captions", "web_caption"]

SPLITS = ("train", "val", "test", "web")
_SLICE = re.compile(r"(.*?)(?:\[(\d*):(\d*)\])?", re.DOTALL)


class ScenesSource:
    """A split of a prepared data set. Holds paths alone; opens its files at the first read of each process.

    A record has `key`, `image` (PNG bytes), `image_id`, `texts` (of `web`: the one noisy caption), `true_texts`
    (five true captions, the first of them the full description), `noise` (a key of `NOISE`), `clean`,
    `questions`, `question_kinds` and `answers` (all three of one length; each answer is a tuple, as sources with
    several answers have it) and `objects` (dicts with `shape`, `color`, `size`, `x`, `y`, `radius`).
    """

    classes = None

    def __init__(self, folder: str, split: str, name: str, length: int):
        self.folder, self.split, self.name, self._length = folder, split, name, length

    @property
    def fingerprint(self) -> str:
        """Hash of configuration, version, split and size: a version's content never changes."""
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

    def __getitem__(self, index: int) -> dict[str, Any]:
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
        """Whether `caption` is what may be said of picture `index` (see `true_captions`)."""
        return plain(caption) in true_captions(scene_of(self[index]))

    def names_largest(self, index: int, caption: str) -> bool:
        """Whether `caption` names colour and shape of the largest object of picture `index`."""
        largest = max(self[index]["objects"], key=lambda o: o["radius"])
        return f"{largest['color']} {largest['shape']}" in caption


def scene_of(record: dict[str, Any]) -> Scene:
    """What a record of `ScenesSource` shows, without its ground."""
    return Scene(objects=tuple(Object(**each) for each in record["objects"]))


def prepare(config: str = "default", data_dir: str | None = None) -> Any:
    """The TFDS builder of `scenes/config`, drawn first where it is not there yet.

    Processes that ask for it at once wait for the first. What a process that died left behind is removed.
    """
    import tensorflow_datasets as tfds

    from jaxmm.data.scenes.builder import Scenes

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    if config not in Scenes.builder_configs:
        raise DataError(f"scenes has no configuration {config!r}; wanted one of "
                        f"{', '.join(Scenes.builder_configs)}")
    builder = Scenes(config=config, data_dir=data_dir, file_format="array_record")
    if not tfds.core.Path(builder.data_dir).exists():
        if "://" in builder.data_dir:      # no locks there
            raise DataError(f"{builder.data_dir} is not there; draw scenes into a local data_dir and copy it")
        folder = Path(builder.data_dir)      # TFDS draws into another beside it, and renames that when it is whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "prepare.lock"):
            for left in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(left)
            tfds.display_progress_bar(False)
            try:
                with tempfile.TemporaryDirectory() as nothing:      # its empty folder of downloads
                    builder.download_and_prepare(download_dir=nothing)
            finally:
                tfds.display_progress_bar(True)
        builder = Scenes(config=config, data_dir=data_dir, file_format="array_record")
    return builder


def open_scenes(split: str, data_dir: str | None = None) -> Source:
    """Opens `split`: `train`, `val`, `test` or `web`; `tiny/train` and so on are those of a small data set for tests,
    and `train[:400]` is the records up to 400 of it.

    At the first use the data set is drawn: in `data_dir`, else `TFDS_DATA_DIR`, else TFDS's own default folder.
    """
    whole, first, last = _SLICE.fullmatch(split).groups()
    config, _, name = whole.rpartition("/")
    if name not in SPLITS:
        raise DataError(f"scenes has no split {split!r}; wanted one of {', '.join(SPLITS)}, or some of their records, "
                        "such as train[:400]")
    builder = prepare(config or "default", data_dir)
    info = builder.info.splits.get(name)
    try:
        source = ScenesSource(str(builder.data_dir), name, f"scenes:{whole}", info.num_examples)
        source[-1]
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{builder.data_dir} is not a whole copy of scenes ({error}); remove that folder, and it "
                        "will be drawn again") from error
    if whole == split:
        return source
    start, stop, _ = slice(*(int(end) if end else None for end in (first, last))).indices(len(source))
    return Slice(source, start, max(start, stop))
