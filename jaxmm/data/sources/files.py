"""Read images in files: one folder per class, files of a list, or arrays in memory."""

import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import EXTENSIONS, DataError, Record, Source, digest, find_images, fingerprint, is_hidden
from jaxmm.data.cleaning import printable
from jaxmm.data.sources.image_roots import locate
from jaxmm.optional import require_extra
from jaxmm.paths import is_address, is_bucket, open_data, user_path

LARGEST_FILE = 2**30
"""Bytes of an image file. More pixels than are decoded do not take more, in any format."""
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
"""Names of folders that are not classes if no others are beside them."""


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Images in files under `root`, with labels or captions in memory."""

    name: str
    root: str
    files: Sequence[str]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    captions: Sequence[tuple[str, ...]] | None = None
    origins: Sequence[tuple[str, ...]] | None = None
    """Where each caption comes from; an empty tuple: the record does not say."""
    image_ids: Sequence[str | None] | None = None
    faults: Mapping[int, str] = field(default_factory=dict, repr=False)
    """The reasons why lines or entries could not be read, by record; `files` has their places instead of a file."""
    notes: tuple[str, ...] = field(default=(), repr=False)
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of the image. Raises `BadRecord` for a line or an entry that could not be read."""
        if index in self.faults:
            raise BadRecord("malformed", f"{self.files[index]} {self.faults[index]}")
        record: Record = {"key": self.key(index), "image": read_image(self.root, self.files[index])}
        if self.labels is not None:
            record["label"] = int(self.labels[index])
        if self.captions is not None:
            record["texts"] = self.captions[index]
        if self.origins is not None and self.origins[index]:
            record["origins"] = self.origins[index]
        if self.image_ids is not None and self.image_ids[index] is not None:
            record["image_id"] = self.image_ids[index]
        return record

    @property
    def has_origins(self) -> bool:
        """True if there are origins of captions."""
        return self.origins is not None

    def key(self, index: int) -> str:
        """Return the file, and the record number if a file may occur more than once."""
        return self.files[index] if self.captions is None else f"{self.files[index]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions."""
        return self.captions[index] if self.captions is not None else ()


def read_image(root: str, file: str) -> bytes:
    """Return the bytes of an image file. Raises `BadRecord` or `OSError`."""
    if not file or is_address(file):
        raise BadRecord("no image", f"its image is {file!r}, an address" if file else "it names no image")
    path = locate(root, file)
    if is_bucket(path):
        with open_data(user_path(path)) as stream:
            return stream.read()
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise BadRecord("unreadable", f"{file!r} is no ordinary file")
    if status.st_size > LARGEST_FILE:
        raise BadRecord("too large", f"{file!r} has {status.st_size:,} bytes; at most {LARGEST_FILE:,} are read")
    with open(path, "rb") as stream:
        return stream.read()


@dataclass(frozen=True, kw_only=True)
class Arrays(Source):
    """Images in memory, uint8 [n, h, w, 3], with labels."""

    name: str
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        """Return one image."""
        return {"key": self.key(index), "image": self.images[index], "label": int(self.labels[index])}

    def key(self, index: int) -> str:
        """Return the name of the source and the record number."""
        return f"{self.name}#{index}"


def open_folder(spec: str, location: str, data_dir: str | None = None) -> Files:
    """Open one folder per class. Classes are the sorted folder names; images may be in subfolders of any depth.

    Hidden and system folders are no classes. What is passed over is counted in `notes`. Raises `DataError`.
    """
    root = user_path(location)
    if not root.is_dir():
        raise DataError(f"source {spec!r}: no folder {location!r}")
    folders = [p.name for p in root.iterdir() if p.is_dir()]
    names = sorted(name for name in folders if not is_hidden(name))
    splits = [name for name in names if name.lower() in SPLITS and any(
        part.is_dir() and not is_hidden(part.name) for part in (root / name).iterdir())]
    if splits and all(name.lower() in SPLITS for name in names):
        raise DataError(f"source {spec!r}: {', '.join(names)} are splits, not classes; expected one of them, as in "
                        f"folder:{Path(location, splits[0])}")
    passed = Counter({"hidden folders": len(folders) - len(names)})
    files, labels, empty = [], [], []
    for label, name in enumerate(names):
        paths = [os.path.relpath(path, root) for path in find_images(root / name, passed)]
        files += paths
        labels += [label] * len(paths)
        empty += [] if paths else [printable(name)]
    if not files:
        raise DataError(f"source {spec!r} is empty: expected one folder per class in {location!r}, with images "
                        f"({' '.join(EXTENSIONS)}){'; ' * bool(+passed)}{_passed_over(passed)}")
    loose = sum(p.name.lower().endswith(EXTENSIONS) for p in root.iterdir())
    inner = sum(p.is_dir() and not is_hidden(p.name) for p in (root / names[0]).iterdir())
    notes = [f"there is one class, {printable(names[0])!r}, with {inner} folders; are these the classes?"] if (
        len(names) == 1 and inner > 1) else []
    notes += [f"{len(empty)} of {len(names)} classes have no images: {', '.join(empty[:5])}"] if empty else []
    notes += [_passed_over(passed)] if +passed else []
    notes += [f"{loose} images are not in the folder of a class and are passed over"] if loose else []
    return Files(name=spec, root=location, files=files, labels=np.asarray(labels, np.int32), notes=tuple(notes),
                 classes=_class_names(names), fingerprint=fingerprint([*names, *files]))


def _class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of folders as they can be written, with a number if two are equal then."""
    written = [printable(name) for name in names]
    return tuple(f"{name}#{number}" if written.count(name) > 1 else name for number, name in enumerate(written)
                 ) if len(set(written)) < len(written) else tuple(written)


def _passed_over(passed: Counter[str]) -> str:
    most = sorted((+passed).items(), key=lambda item: (-item[1], item[0]))[:8]
    counts = ", ".join(f"{printable(what)}: {count}" for what, count in most)
    return f"passed over {counts}" if counts else ""


def open_digits(spec: str, location: str, data_dir: str | None = None) -> Arrays:
    """Open scikit-learn's 1,797 scanned digits, 8 x 8 uint8. Every fifth of each class is in the test split."""
    require_extra("train", "the source digits")
    from sklearn.datasets import load_digits  # takes a second to import

    if location not in ("train", "test"):
        raise DataError(f"source {spec!r}: unknown split {location!r}; expected train or test")
    digits = load_digits()
    number = np.empty(len(digits.target), np.int64)  # of each digit among those of its class
    for label in range(10):
        where = digits.target == label
        number[where] = np.arange(where.sum())
    chosen = (number % 5 == 4) == (location == "test")
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    return Arrays(name=spec, images=images, labels=digits.target[chosen].astype(np.int32),
                  classes=tuple("0123456789"), fingerprint=fingerprint([digest([images.tobytes()], size=64)]))
