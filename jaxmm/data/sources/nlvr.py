"""Read NLVR2 (Suhr et al. 2019): sentences that are true or false of two images, as its authors or BLIP's list them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint, image_folder, read_text

CLASSES = ("False", "True")
WORDS = 40
"""The largest number of words of a sentence that are read."""
OTHER = {"left": "right", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """Two images in files under `root`, a sentence, and a label: is it true of them?"""

    name: str
    root: str
    files: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    labels: np.ndarray
    fingerprint: str = field(repr=False)
    classes = CLASSES
    images_per_record = 2

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of both images."""
        both = tuple(Path(self.root, file).read_bytes() for file in self.files[index])
        return {"key": self.key(index), "image": both, "texts": self.texts(index), "label": int(self.labels[index])}

    def key(self, index: int) -> str:
        """Return the first image file and the record number."""
        return f"{self.files[index][0]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the sentence."""
        return (self.sentences[index],)

    def vary(self, record: Record, rng: np.random.Generator) -> Record:
        """Swap the images and the words left and right, with probability one half.

        The authors of BLIP also do it in evaluation. We do not, so that a measurement can be repeated.
        """
        if rng.random() < 0.5:
            return record
        return record | {"image": record["image"][::-1], "texts": tuple(map(swap_left_right, record["texts"]))}


def open_nlvr(spec: str, location: str, data_dir: str | None = None) -> Pairs:
    """Open NLVR2's JSON lines, whose image names follow from `identifier`, or BLIP's JSON list with `images`.

    The images may be beside the file, or in a folder beside it or beside its folder. NLVR2's may be in folders named
    after the split or after their `directory`. Raises `DataError`.
    """
    text = read_text(spec, location)
    files, sentences, labels, layouts = [], [], [], []
    for where, row in _rows(f"source {spec!r}: {location}", text):
        named = _named(row)
        label = str(row.get("label")) if isinstance(row, dict) else None
        if named is None or not isinstance(row.get("sentence"), str) or label not in CLASSES:
            raise DataError(f"{where}: expected an object with `sentence`, a text, `label`, True or False, and "
                            "`images`, two paths, or NLVR2's `identifier`")
        files.append(named[0])
        layouts.append(named[1])
        sentences.append(clean_sentence(row["sentence"]))
        labels.append(CLASSES.index(label))
    if not files:
        raise DataError(f"source {spec!r} is empty: it has no records")
    tries = ((number, image_folder(Path(location), os.path.join(folder, files[0][0])))
             for number, folder in enumerate(layouts[0]))
    number, root = next(((number, root) for number, root in tries if root is not None), (0, None))
    if root is None:
        raise DataError(f"source {spec!r}: {files[0][0]!r}, the first image, is neither beside {location} nor in a "
                        "folder beside it or beside its folder")
    files = [tuple(os.path.join(folders[number], file) for file in both)
             for both, folders in zip(files, layouts, strict=True)]
    return Pairs(name=spec, root=str(root), files=files, sentences=sentences, labels=np.asarray(labels, np.int32),
                 fingerprint=fingerprint([text]))


def clean_sentence(sentence: str) -> str:
    """Return a sentence as BLIP reads it: lower case, less punctuation, at most `WORDS` words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", sentence.lower()).split()[:WORDS])


def swap_left_right(sentence: str) -> str:
    """Return a lower-case sentence with "right" for "left" and "left" for "right"."""
    return re.sub(r"\b(left|right)\b", lambda match: OTHER[match[0]], sentence)


def _rows(where: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield each row of a JSON list or of JSON lines, with its place for messages."""
    is_list = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_list else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}:{error.lineno if is_list else number} is not JSON: {error}") from None
        if is_list:
            yield from ((f"{where}, entry {entry}", row) for entry, row in enumerate(value))
        else:
            yield f"{where}:{number}", value


def _named(row: Any) -> tuple[tuple[str, str], tuple[str, ...]] | None:
    """Return the two files that a row names and the folders that they may be in; None if it names none."""
    if not isinstance(row, dict):
        return None
    both = row.get("images")
    if isinstance(both, list) and len(both) == 2 and all(isinstance(file, str) for file in both):
        return tuple(both), ("",)
    name = row.get("identifier")
    if not isinstance(name, str) or "-" not in name:
        return None
    stem, split, folder = name.rpartition("-")[0], name.partition("-")[0], str(row.get("directory", ""))
    layouts = ("", split, folder, f"{split}/{folder}")
    return (f"{stem}-img0.png", f"{stem}-img1.png"), layouts
