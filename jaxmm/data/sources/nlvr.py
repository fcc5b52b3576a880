"""Read NLVR2 (Suhr et al. 2019): sentences that are true or false of two images, as its authors or BLIP's list them."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.cleaning import usable_texts
from jaxmm.data.sources.annotations import Row, read_rows
from jaxmm.data.sources.columns import read_location
from jaxmm.data.sources.files import read_image
from jaxmm.data.sources.image_roots import find_root
from jaxmm.paths import exists, user_path

CLASSES = ("False", "True")
WORDS = 40
"""The largest number of words of a sentence that are read."""
OTHER = {"left": "right", "right": "left"}
EXPECTED = ("expected an object with `sentence`, a text, `label`, True or False, and `images`, two paths, or NLVR2's "
            "`identifier`")


@dataclass(frozen=True, kw_only=True)
class Pairs(Source):
    """Two images in files under `root`, a sentence, and a label: is it true of them?"""

    name: str
    root: str
    files: Sequence[tuple[str, str]]
    sentences: Sequence[str]
    labels: np.ndarray
    faults: Mapping[int, str] = field(default_factory=dict, repr=False)
    """The reasons why rows could not be read, by record; `files` has their places."""
    notes: tuple[str, ...] = field(default=(), repr=False)
    fingerprint: str = field(repr=False)
    classes = CLASSES
    images_per_record = 2

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of both images. Raises `BadRecord` for a row that could not be read."""
        if index in self.faults:
            raise BadRecord("malformed", f"{self.files[index][0]} {self.faults[index]}")
        both = tuple(read_image(self.root, file) for file in self.files[index])
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

    See `image_roots` for the folder of the images; NLVR2's may be in folders named after the split or after their
    `directory`. A row that cannot be read is one bad record. Raises `DataError`.
    """
    place = read_location(spec, location, exists=exists)
    read = read_rows(spec, place.path, place.columns, ("images", "sentence"))
    rows = read.rows or ((Row(":1", read.content),) if read.content is not None else ())
    names, sentences, labels, faults = [], [], [], {}
    for number, row in enumerate(rows):
        named = None if row.value is None else _named(row.value)
        label = None if row.value is None else str(row.value.get("label")).capitalize()
        fault = row.fault
        if row.value is not None and (named is None or not usable_texts(row.value.get("sentence")) or
                                      label not in CLASSES):
            fault = EXPECTED
        if fault is not None:
            faults[number] = fault
        names.append(named if fault is None else [(f"{Path(place.path).name}{row.place}",) * 2])
        sentences.append("" if fault else clean_sentence(*usable_texts(row.value["sentence"])))
        labels.append(0 if fault else CLASSES.index(label))
    if rows and len(faults) == len(rows):
        raise DataError(f"source {spec!r}: {place.path}{rows[0].place}: {faults[0]}")
    most = max((len(forms) for forms in names), default=0)
    first = [["" if number in faults else forms[min(form, len(forms) - 1)][0] for number, forms in enumerate(names)]
             for form in range(most)]
    root = find_root(spec, user_path(place.path), first, root=place.root)
    notes = [*read.notes, *root.notes]
    notes += [f"{len(faults)} of {len(rows)} rows cannot be read"] if faults else []
    return Pairs(name=spec, root=root.path, files=[forms[min(root.form, len(forms) - 1)] for forms in names],
                 sentences=sentences, labels=np.asarray(labels, np.int32), faults=faults, notes=tuple(notes),
                 fingerprint=fingerprint([read.text]))


def clean_sentence(sentence: str) -> str:
    """Return a sentence as BLIP reads it: lower case, less punctuation, at most `WORDS` words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", sentence.lower()).split()[:WORDS])


def swap_left_right(sentence: str) -> str:
    """Return a lower-case sentence with "right" for "left" and "left" for "right"."""
    return re.sub(r"\b(left|right)\b", lambda match: OTHER[match[0]], sentence)


def _named(row: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Return the two files that a row names, in every folder that they may be in; None if it names none."""
    both = row.get("images")
    if isinstance(both, list) and len(both) == 2 and all(isinstance(file, str) for file in both):
        return [tuple(both)]
    name = row.get("identifier")
    if not isinstance(name, str) or "-" not in name:
        return None
    stem, split, folder = name.rpartition("-")[0], name.partition("-")[0], str(row.get("directory", ""))
    return [tuple(os.path.join(layout, f"{stem}-img{number}.png") for number in (0, 1))
            for layout in ("", split, folder, f"{split}/{folder}")]
