"""NLVR2 (Suhr et al. 2019): sentences that are true or false of two pictures, as its authors and BLIP's list them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmm.data.base import DataError, Record, fingerprint, image_folder, read_text

CLASSES = ("False", "True")
WORDS = 40
"""Words of a sentence that are read, at most."""
OTHER = {"left": "right", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two pictures in files under `root`, a sentence, and whether it is true of them."""

    name: str
    root: str
    files: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    labels: np.ndarray
    fingerprint: str = field(repr=False)
    classes: ClassVar[tuple[str, str]] = CLASSES
    pictures: ClassVar[int] = 2

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Reads the bytes of both pictures."""
        both = tuple(Path(self.root, file).read_bytes() for file in self.files[index])
        return {"key": self.key(index), "image": both, "texts": self.texts(index), "label": int(self.labels[index])}

    def key(self, index: int) -> str:
        """The first picture and the record number."""
        return f"{self.files[index][0]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """The sentence."""
        return (self.sentences[index],)

    def vary(self, record: Record, rng: np.random.Generator) -> Record:
        """Every second record with its pictures in the other order, and the words left and right exchanged.

        The authors of BLIP do it when they evaluate, too; we do not, so that a measurement can be repeated.
        """
        if rng.random() < 0.5:
            return record
        return record | {"image": record["image"][::-1], "texts": tuple(map(exchanged, record["texts"]))}


def open_nlvr(spec: str, location: str) -> Pairs:
    """NLVR2's JSON object a line, whose pictures are named after `identifier`, or BLIP's JSON list with `images`.

    The pictures may lie beside the file, or in a folder beside it or beside its folder; NLVR2's in folders named
    after the split or their `directory`. Raises `DataError`.
    """
    text = read_text(spec, location)
    files, sentences, labels, layouts = [], [], [], []
    for where, row in _rows(f"source {spec!r}: {location}", text):
        named = _named(row)
        label = str(row.get("label")) if isinstance(row, dict) else None
        if named is None or not isinstance(row.get("sentence"), str) or label not in CLASSES:
            raise DataError(f"{where}: wanted an object with `sentence`, a text, `label`, True or False, and `images`, "
                            "two paths, or NLVR2's `identifier`")
        files.append(named[0])
        layouts.append(named[1])
        sentences.append(cleaned(row["sentence"]))
        labels.append(CLASSES.index(label))
    if not files:
        raise DataError(f"source {spec!r} is empty: it has no records")
    tries = ((number, image_folder(Path(location), os.path.join(folder, files[0][0])))
             for number, folder in enumerate(layouts[0]))
    number, root = next(((number, root) for number, root in tries if root is not None), (0, None))
    if root is None:
        raise DataError(f"source {spec!r}: {files[0][0]!r}, the first picture, is neither beside {location} nor in a "
                        "folder beside it or beside its folder")
    files = [tuple(os.path.join(folders[number], file) for file in both)
             for both, folders in zip(files, layouts, strict=True)]
    return Pairs(name=spec, root=str(root), files=files, sentences=sentences, labels=np.asarray(labels, np.int32),
                 fingerprint=fingerprint([text]))


def cleaned(sentence: str) -> str:
    """As BLIP reads it: lower case, without some of the punctuation, at most `WORDS` words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", sentence.lower()).split()[:WORDS])


def exchanged(sentence: str) -> str:
    """`sentence`, in lower case, with right for left and left for right."""
    return re.sub(r"\b(left|right)\b", lambda word: OTHER[word[0]], sentence)


def _rows(where: str, text: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, object) of a JSON list, or of a JSON object a line."""
    whole = text.lstrip().startswith("[")
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}:{error.lineno if whole else number} is not JSON: {error}") from None
        if not whole:
            yield f"{where}:{number}", found
            continue
        yield from ((f"{where}, entry {entry}", row) for entry, row in enumerate(found))


def _named(row: Any) -> tuple[tuple[str, str], tuple[str, ...]] | None:
    """A row's two files, and the folders that they may be in; None where it names none."""
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
