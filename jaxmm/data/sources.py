"""Where pictures and words come from: one string names a source, which is read by record number.

`folder:DIR`, `captions:FILE.jsonl`, `coco:FILE.json[:SPLIT]`, `nlvr:FILE.json`, `digits:SPLIT`, `scenes:SPLIT`,
`tfds:NAME:SPLIT`, `vqa:PLACE`, `tars:GLOB` and `parquet:GLOB`.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Record = dict[str, Any]
"""Some of `key` (str), `image` (encoded bytes, or uint8 [h, w, 3]; or a tuple of two such), `image_id` (str; without
one, pictures of the same bytes count as the same), `texts` (tuple of str: all captions of the picture), `label` (int),
`question` (str) with `answers` (tuple of str, repeats counted)."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class DataError(ValueError):
    """Data that cannot be used: the message says what was given, what was wanted and where."""


@runtime_checkable
class Source(Protocol):
    """Records by number. Must pickle, because worker processes read it too.

    May have `key(i)` and `texts(i)`, which answer without reading the picture; `pictures`, how many a record has (1);
    `vary(record, rng)`, a record as training sees it, changed by chance; and `shards()`, the sources that make it up,
    of which each reads its index when it is first needed, and may have `fault`, what is wrong with it as a whole.
    """

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str

    def __len__(self) -> int:
        """How many records there are; at least one."""

    def __getitem__(self, index: int) -> Record:
        """Reads one record; any exception counts as a record that cannot be read."""


def open_source(spec: str, *, data_dir: str | None = None) -> Source:
    """Opens the source that `spec` names; `data_dir` is where prepared TFDS data sets lie. Raises `DataError`."""
    from jaxmm.data import mixed

    if mixed.is_mixed(spec):
        return mixed.open_mixed(spec, data_dir)
    kind, colon, location = spec.partition(":")
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise DataError(f"source {spec!r}: unknown kind {kind!r}{hint}; wanted one of "
                        + ", ".join(f"{name}:{what}" for name, (_, what) in KINDS.items()))
    opener, what = KINDS[kind]
    if not colon or not location:
        raise DataError(f"source {spec!r}: wanted {kind}:{what}")
    source = opener(spec, location, data_dir)
    if not source:  # not its length, for which sources of many shards read all of them
        raise DataError(f"source {spec!r} is empty: it has no records")
    return source


def record_key(source: Source, index: int) -> str:
    """The name of a record, also of one that cannot be read."""
    if hasattr(source, "key"):
        return source.key(index)
    try:
        return source[index]["key"]
    except Exception:
        return f"{source.name}#{index}"


def record_texts(source: Source, index: int) -> tuple[str, ...]:
    """All captions of a record that are not blank, without reading its picture where the source can."""
    texts = source.texts(index) if hasattr(source, "texts") else source[index].get("texts", ())
    return tuple(text for text in texts if text.strip())


@dataclass(frozen=True, kw_only=True)
class Files:
    """Pictures in files under `root`, with labels or captions held in memory."""

    name: str
    root: str
    files: Sequence[str]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    captions: Sequence[tuple[str, ...]] | None = None
    image_ids: Sequence[str | None] | None = None
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Reads the picture's bytes."""
        with open(os.path.join(self.root, self.files[index]), "rb") as file:
            record: Record = {"key": self.key(index), "image": file.read()}
        if self.labels is not None:
            record["label"] = int(self.labels[index])
        if self.captions is not None:
            record["texts"] = self.captions[index]
        if self.image_ids is not None and self.image_ids[index] is not None:
            record["image_id"] = self.image_ids[index]
        return record

    def key(self, index: int) -> str:
        """The file, and the record number where a file may occur more than once."""
        return self.files[index] if self.captions is None else f"{self.files[index]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions."""
        return self.captions[index] if self.captions is not None else ()


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Pictures in memory, uint8 [n, h, w, 3], with labels."""

    name: str
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        """One picture."""
        return {"key": self.key(index), "image": self.images[index], "label": int(self.labels[index])}

    def key(self, index: int) -> str:
        """The source and the record number."""
        return f"{self.name}#{index}"


def fingerprint(parts: Iterable[object]) -> str:
    """A short digest of what a source lists, to notice at resume that it changed."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(str(part).encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def find_pictures(folder: str | Path) -> list[str]:
    """The sorted paths of all pictures in `folder` and the folders in it, by their names' ends."""
    return sorted(os.path.join(where, file) for where, _, names in os.walk(folder) for file in names
                  if file.lower().endswith(EXTENSIONS) and not file.startswith("."))


def open_folder(spec: str, location: str, data_dir: str | None = None) -> Files:
    """A folder a class: the classes are the sorted names of its folders, pictures may lie deeper in them."""
    root = Path(location)
    if not root.is_dir():
        raise DataError(f"source {spec!r}: no folder {location!r}")
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = [os.path.relpath(path, root) for path in find_pictures(root / name)]
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"source {spec!r} is empty: wanted a folder a class in {location!r}, with pictures "
                        f"({' '.join(EXTENSIONS)}) in them")
    return Files(name=spec, root=location, files=files, labels=np.asarray(labels, np.int32), classes=classes,
                 fingerprint=fingerprint([*classes, *files]))


def open_captions(spec: str, location: str, data_dir: str | None = None) -> Files:
    """A JSON object a line: `image` (a path relative to the file), `caption` or `captions`, perhaps `image_id`."""
    lines = read_text(spec, location).split("\n")
    files, captions, image_ids = [], [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"source {spec!r}: {location}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise DataError(f"{where}: wanted an object with `image`, a path")
        texts = next((row[name] for name in ("captions", "texts", "caption") if row.get(name) is not None), ())
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: wanted `caption`, a text, or `captions`, a list of texts")
        files.append(row["image"])
        captions.append(tuple(texts))
        image_ids.append(None if row.get("image_id") is None else str(row["image_id"]))
    return Files(name=spec, root=str(Path(location).parent), files=files, captions=captions, image_ids=image_ids,
                 fingerprint=fingerprint(lines))


def open_coco(spec: str, location: str, data_dir: str | None = None) -> Files:
    """COCO's captions, Karpathy's splits of them, or BLIP's lists of those."""
    from jaxmm.data import coco

    return coco.open_coco(spec, location)


def open_digits(spec: str, location: str, data_dir: str | None = None) -> Arrays:
    """scikit-learn's 1,797 scanned digits, 8 x 8 greys as uint8; every fifth of each class is the test split."""
    from sklearn.datasets import load_digits  # a second of import that the other sources do without

    if location not in ("train", "test"):
        raise DataError(f"source {spec!r}: unknown split {location!r}; wanted train or test")
    digits = load_digits()
    number = np.empty(len(digits.target), np.int64)  # of each digit among those of its class
    for label in range(10):
        where = digits.target == label
        number[where] = np.arange(where.sum())
    chosen = (number % 5 == 4) == (location == "test")
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return Arrays(name=spec, images=images, labels=digits.target[chosen].astype(np.int32),
                  classes=tuple("0123456789"), fingerprint=fingerprint([hashlib.blake2b(images.tobytes()).hexdigest()]))


def open_scenes(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Our own pictures of coloured shapes, generated on first use."""
    from jaxmm.data import scenes

    return scenes.open_scenes(location, data_dir)


def open_nlvr(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Sentences about two pictures."""
    from jaxmm.data import nlvr

    return nlvr.open_nlvr(spec, location)


def open_tfds(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Any TFDS data set that was prepared as ArrayRecord."""
    from jaxmm.data import tfds

    return tfds.open_tfds(spec, location, data_dir)


def open_tars(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Tar shards as img2dataset and WebDataset write them."""
    from jaxmm.data import tars

    return tars.open_tars(spec, location)


def open_parquet(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Parquet files that hold the pictures' bytes."""
    from jaxmm.data import parquet

    return parquet.open_parquet(spec, location)


def open_vqa(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Questions about pictures, with answers."""
    from jaxmm.data import vqa

    return vqa.open_questions(spec, location, data_dir)


def read_text(spec: str, location: str) -> str:
    """The text of a file of the source `spec`. Raises `DataError`."""
    try:
        return Path(location).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"source {spec!r}: cannot read {location}: {error.strerror}") from None


def image_folder(file: Path, picture: str) -> Path | None:
    """The folder of COCO's pictures: beside the annotations, or beside the folder that they are in."""
    folder = file.resolve().parent
    for candidate in (folder, folder / "images", *_folders(folder), folder.parent, *_folders(folder.parent)):
        if (candidate / picture).is_file():
            return candidate
    return None


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


Opener = Callable[[str, str, str | None], Source]

KINDS: dict[str, tuple[Opener, str]] = {
    "captions": (open_captions, "FILE.jsonl"),
    "coco": (open_coco, "FILE.json[:SPLIT]"),
    "digits": (open_digits, "SPLIT"),
    "folder": (open_folder, "DIR"),
    "nlvr": (open_nlvr, "FILE.json"),
    "parquet": (open_parquet, "GLOB"),
    "scenes": (open_scenes, "SPLIT"),
    "tars": (open_tars, "GLOB"),
    "tfds": (open_tfds, "NAME:SPLIT"),
    "vqa": (open_vqa, "PLACE"),
}
"""What a spec can begin with: how it is opened, and what follows the colon."""
