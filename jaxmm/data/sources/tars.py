"""Read tar shards as img2dataset and WebDataset write them: `KEY.jpg`, `KEY.txt`, `KEY.json`, `KEY.cls`.

A key ends at the first dot of a name, as in WebDataset (`KEY.input.jpg` and `KEY.output.txt` are one record), or, if
several records would have the same key then, at the last one (`22.05.jpg`, `22.06.jpg`).

Shards are untrusted. Headers are read and images are located, nothing is ever extracted; names are only names; members
other than plain files, and files other than images and text (such as pickles), are skipped; every size in a header is
checked against the size of the file.
"""

import contextlib
import io
import itertools
import json
import logging
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import EXTENSIONS, Record, Source, fingerprint
from jaxmm.data.cleaning import clean, printable, usable_texts
from jaxmm.data.sources.columns import Columns, read_location
from jaxmm.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT, Shards, find_files
from jaxmm.data.sources.tar_members import Member, TarFault, members, open_tar, tar_size

log = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
TEXT_ENDINGS = ("txt", "text", "caption", "captions", "cap")
IMAGE_PARTS = ("image", "input", "img", "photo", "picture", "rgb", "0")
"""Parts of names that say which one of several images of a record is used, in order of preference; else the first."""
_IMAGE, _TEXT, _JSON, _LABEL = range(4)


@dataclass(frozen=True)
class _Index:
    keys: list[str]
    places: np.ndarray
    """Offset and size of image, text, JSON and label, int64 [n, 4, 2]; the offset is -1 if there is none."""
    end: int
    fingerprint: str
    fault: str | None


@dataclass(frozen=True)
class Tar(Source):
    """The records of one tar: consecutive members with the same key. Its headers are read at first use."""

    path: Path
    stem: str
    columns: Columns = field(default_factory=Columns)
    classes: tuple[str, ...] | None = None
    """Names of the classes, which are the same in all tars."""
    tags: tuple[str, ...] | None = None
    """Names of the tags; the label is then an array of numpy with one number per name, above zero for those that the
    image has."""
    clip_benchmark: bool = False
    """True for CLIP_benchmark's layout: labels are numbers of the classes, and a text has one caption per line."""

    @property
    def name(self) -> str:
        """The spec of this file alone."""
        return f"tars:{self.path}"

    @property
    def fingerprint(self) -> str:
        """A digest of the name and size of the file and the names, sizes and header checksums of its members."""
        return self._index.fingerprint

    @property
    def fault(self) -> str | None:
        """The damage of the tar, if any. The records before it can be used."""
        return self._index.fault

    def __len__(self):
        return len(self._index.keys)

    def __getitem__(self, index: int) -> Record:
        """Read the members of one record. Raises `BadRecord` if they are too large or reach past the end."""
        record: Record = {"key": self.key(index)}
        with open_tar(self.path) as file:
            texts = self._texts(file, index)
            if texts:
                record["texts"] = texts
            if self.classes is not None:
                record["label"] = self._label(file, index)
            if self.tags is not None:
                record["tags"] = self._tags(file, index)
            image = self._read(file, index, _IMAGE)
        return record if image is None else record | {"image": image}

    def key(self, index: int) -> str:
        """Return the name of the tar without its suffix, and the key of the members."""
        return f"{self.stem}/{self._index.keys[index]}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions: the text, else those of the JSON. The image is not read."""
        with open_tar(self.path) as file:
            return self._texts(file, index)

    def tags_of(self, index: int) -> tuple[int, ...]:
        """Return the numbers of the tags. The image is not read."""
        with open_tar(self.path) as file:
            return self._tags(file, index)

    @property
    def has_labels(self) -> bool:
        """True if records have labels, and no captions or the user names the labels."""
        index = self._index
        return bool((index.places[:, _LABEL, 0] >= 0).any()) and ("label" in self.columns.chosen or not (
            (index.places[:, _TEXT, 0] >= 0).any() or any(self.texts(i) for i in range(min(3, len(self))))))

    def labels(self) -> Iterator[str]:
        """Yield the text of every label."""
        if (self._index.places[:, _LABEL, 0] >= 0).any():
            with open_tar(self.path) as file:
                for index in range(len(self)):
                    with contextlib.suppress(BadRecord):
                        if label := self._read(file, index, _LABEL):
                            yield _class_name(label)

    def _texts(self, file: BufferedIOBase, index: int) -> tuple[str, ...]:
        text = self._read(file, index, _TEXT)
        if self.clip_benchmark and text is not None:
            return usable_texts(clean(text).splitlines())
        if texts := usable_texts(text):
            return texts
        content = self._read(file, index, _JSON)
        return () if content is None else _captions(content, self.columns)

    def _label(self, file: BufferedIOBase, index: int) -> int | None:
        label = _class_name(self._read(file, index, _LABEL) or b"")
        if self.clip_benchmark:
            return int(label) if label.isdecimal() else None
        return self.classes.index(label) if label in self.classes else None

    def _tags(self, file: BufferedIOBase, index: int) -> tuple[int, ...]:
        try:
            values = read_vector(self._read(file, index, _LABEL) or b"", len(self.tags))
        except ValueError as error:
            raise BadRecord("no label", str(error)) from None
        return tuple(np.flatnonzero(values > 0).tolist())

    def _read(self, file: BufferedIOBase, index: int, kind: int) -> bytes | None:
        offset, size = self._index.places[index, kind].tolist()
        if offset < 0:
            return None
        what, largest = ("image", LARGEST_IMAGE) if kind == _IMAGE else ("text", LARGEST_TEXT)
        if offset + size > self._index.end:
            raise BadRecord("truncated", f"its {what} should have {size} bytes and the file ends before")
        if size > largest:
            raise BadRecord("too large", f"its {what} has {size} bytes; at most {largest} are read")
        file.seek(offset)
        return file.read(size)

    @cached_property
    def _index(self) -> _Index:
        listed: list[Member] = []
        end, fault = 0, None
        try:
            with open_tar(self.path) as file:
                end = tar_size(file)
                for member in members(file, end):
                    listed.append(member)
        except TarFault as error:
            fault = str(error)
        except OSError as error:
            fault = f"it cannot be read: {error.strerror}"
        keys, places = _records(listed, self.columns)
        if fault:
            log.warning("%s: %s; %d records of it are used", self.path, fault, len(keys))
        chosen = [str(self.columns)] if self.columns.chosen else []
        parts = ((member.name, member.offset, member.size, member.checksum) for member in listed)
        return _Index(keys, places, end, fingerprint([self.path.name, end, *parts, *chosen]), fault)


def _records(listed: Sequence[Member], columns: Columns) -> tuple[list[str], np.ndarray]:
    """Return the key of every record, and the places of its members. See the module for what a key is."""
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    used: dict[str, int] = {}
    read = ((key, kind, member) for member, (key, kind) in zip(listed, _keys(listed, columns), strict=True)
            if kind is not None)
    for key, group in itertools.groupby(read, lambda row: row[0]):
        row = [(-1, 0)] * 4
        for _, kind, member in group:
            if row[kind][0] < 0:
                row[kind] = (member.offset, member.size)
        name = printable(key)
        known = used.get(name)
        if known is not None and all(old[0] < 0 or new[0] < 0 for old, new in zip(places[known], row, strict=True)):
            places[known] = [max(both) for both in zip(places[known], row, strict=True)]  # what was missing
            continue
        name = _unique(name, used)
        used[name] = len(keys)
        keys.append(name)
        places.append(row)
    return keys, np.asarray(places, np.int64).reshape(-1, 4, 2)


def _keys(listed: Sequence[Member], columns: Columns) -> Iterator[tuple[str, int | None]]:
    """Yield the key and the kind of every member; the kind is None for one that is not read."""
    def first_part(member: Member) -> str:
        folder, slash, base = member.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    plain = any(_split(member.name, columns) == (first_part(member), _IMAGE) for member in listed)
    for key, group in itertools.groupby(listed, first_part):
        split = [_split(member.name, columns) for member in group]
        of_stem: dict[str, set[int]] = {}
        for stem, kind in split:
            if kind is not None:
                of_stem.setdefault(stem, set()).add(kind)
        images = [stem for stem, kinds in of_stem.items() if _IMAGE in kinds]
        complete = {stem for stem in images if len(of_stem[stem]) > 1}
        own = of_stem.get(key, set())
        if _IMAGE in own:  # KEY.mask.png is something else; KEY.en.txt is the text if there is no other
            taken = own | ({_TEXT, _JSON} if own & {_TEXT, _JSON} else set())
            yield from ((stem, kind) if stem == key or stem in complete else (key, None if kind in taken else kind)
                        for stem, kind in split)
        elif len(of_stem) < 2 or complete or len(of_stem) == len(images):
            yield from ((stem, None if plain and stem in images and stem not in complete else kind)
                        for stem, kind in split)
        else:
            parts = [stem[len(key):].lower().split(".") for stem in images]
            best = min(range(len(images)), key=lambda i: ([part not in parts[i] for part in IMAGE_PARTS], i),
                       default=None)
            yield from ((key, None if kind == _IMAGE and stem != images[best] else kind) for stem, kind in split)


def read_vector(content: bytes, size: int) -> np.ndarray:
    """Return the vector of `size` numbers in the content of an .npy file. Raises `ValueError` for anything else."""
    file = io.BytesIO(content)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in header:
        raise ValueError(f"its label is an array of numpy's version {version}; expected one of {list(header)}")
    shape, _, dtype = header[version](file)
    if shape != (size,) or dtype.kind not in "biuf":
        raise ValueError(f"its label is an array of {dtype} with the shape {shape}; expected {size} numbers")
    return np.frombuffer(content, dtype, size, file.tell())     # of what is there: the header may claim any size


def open_tars(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open each tar that the pattern `location` matches as one shard. Raises `DataError`."""
    place = read_location(spec, location, ("image", "caption", "label"))
    tars = [Tar(path, stem, place.columns) for path, stem in find_files(spec, place.path, SUFFIXES)]
    notes = ("a compressed tar is slow to read at random; `jaxmm data import` reads it in order",) if any(
        tar.path.suffix in (".gz", ".tgz") for tar in tars) else ()
    if not tars[0].has_labels:
        return Shards(name=spec, parts=tuple(tars), notes=notes)
    labels = {label for tar in tars for label in tar.labels()}
    numbers = all(map(str.isdecimal, labels))
    classes = tuple(map(str, range(1 + max(map(int, labels))))) if labels and numbers else tuple(sorted(labels))
    return Shards(name=spec, parts=tuple(replace(tar, classes=classes) for tar in tars), classes=classes, notes=notes)


def _split(name: str, columns: Columns) -> tuple[str, int | None]:
    """Return the name up to its last dot, and the kind by what follows: None for what is not read."""
    folder, slash, base = name.rpartition("/")
    for kind, chosen in ((_IMAGE, "image"), (_TEXT, "caption"), (_LABEL, "label")):
        if chosen in columns.chosen and base.lower().endswith(f".{columns.chosen[chosen].lower()}"):
            return folder + slash + base[:-1 - len(columns.chosen[chosen])], kind
    stem, dot, ending = base.rpartition(".")
    ending = ending.lower()
    kind = (_IMAGE if f".{ending}" in EXTENSIONS and "image" not in columns.chosen else
            _TEXT if ending in TEXT_ENDINGS and "caption" not in columns.chosen else
            _JSON if ending == "json" else _LABEL if ending == "cls" and "label" not in columns.chosen else None)
    return folder + slash + stem, kind if stem and dot and not stem.startswith(".") else None


def _unique(key: str, used: Container[str]) -> str:
    """Return `key`, with a number if it is in `used`."""
    name, number = key, 1
    while name in used:
        number += 1
        name = f"{key}#{number}"
    return name


def _class_name(label: bytes) -> str:
    name = printable(label.decode("utf-8", "replace").strip())
    return str(int(name)) if name.isdecimal() else name


def _captions(content: bytes, columns: Columns) -> tuple[str, ...]:
    try:
        row = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return ()
    return usable_texts(columns.get(row, "caption")) if isinstance(row, dict) else usable_texts(row) if isinstance(
        row, str) else ()
