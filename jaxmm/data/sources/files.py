"""Read images in files: one folder per class, a list of captions, or arrays in memory."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxmm.data.base import EXTENSIONS, DataError, Record, Source, digest, find_images, fingerprint, read_text
from jaxmm.optional import require_extra


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Images in files under `root`, with labels or captions in memory."""

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
        """Read the bytes of the image."""
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
        """Return the file, and the record number if a file may occur more than once."""
        return self.files[index] if self.captions is None else f"{self.files[index]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions."""
        return self.captions[index] if self.captions is not None else ()


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
    """Open one folder per class. Classes are the sorted folder names; images may be in subfolders of any depth."""
    root = Path(location)
    if not root.is_dir():
        raise DataError(f"source {spec!r}: no folder {location!r}")
    classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    files, labels = [], []
    for label, name in enumerate(classes):
        paths = [os.path.relpath(path, root) for path in find_images(root / name)]
        files += paths
        labels += [label] * len(paths)
    if not files:
        raise DataError(f"source {spec!r} is empty: expected one folder per class in {location!r}, with images "
                        f"({' '.join(EXTENSIONS)})")
    return Files(name=spec, root=location, files=files, labels=np.asarray(labels, np.int32), classes=classes,
                 fingerprint=fingerprint([*classes, *files]))


def open_captions(spec: str, location: str, data_dir: str | None = None) -> Files:
    """Open JSON lines with `image` (a path relative to the file), `caption` or `captions`, and perhaps `image_id`."""
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
            raise DataError(f"{where}: expected an object with `image`, a path")
        texts = next((row[name] for name in ("captions", "texts", "caption") if row.get(name) is not None), ())
        texts = (texts,) if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: expected `caption`, a text, or `captions`, a list of texts")
        files.append(row["image"])
        captions.append(tuple(texts))
        image_ids.append(None if row.get("image_id") is None else str(row["image_id"]))
    return Files(name=spec, root=str(Path(location).parent), files=files, captions=captions, image_ids=image_ids,
                 fingerprint=fingerprint(lines))


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
