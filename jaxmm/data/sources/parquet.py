"""Read Parquet files with encoded images, as Hugging Face data sets and img2dataset write them."""

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.cleaning import TEXT_NAMES, clean, printable, texts_with_origins, usable_texts
from jaxmm.data.sources.columns import Columns, read_location
from jaxmm.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT, Shards, find_files
from jaxmm.paths import is_bucket, open_data

log = logging.getLogger(__name__)

FIRST = ("texts", "captions", "text", "caption")
"""Names of caption columns that come before the others of `columns.NAMES`."""
NOT_CAPTIONS = ("key", "url", "id", "split", "status", "path", "file", "name", "sha256", "md5", "exif", "license",
                "error", "label", "labels", "class", "category", "origin", "origins")
"""Parts of the names of text columns that are no captions."""
LARGEST_GROUP = 2**31
"""Uncompressed bytes of one column in a row group; records of larger ones are refused as too large."""
CACHED_GROUPS = 4
"""The number of row groups that stay in memory."""


@dataclass(frozen=True)
class _Index:
    image: str
    captions: tuple[str, ...]
    """The caption columns; the first one with a text is used."""
    origin: str | None
    """The column with the origins of captions."""
    label: str | None
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    names: tuple[str, ...]
    """All columns."""
    starts: np.ndarray
    """The first row of each row group, then the number of rows."""
    fingerprint: str
    fault: str | None


@dataclass(frozen=True)
class File(Source):
    """The rows of one Parquet file, read one row group at a time. The footer is read at first use."""

    path: Path
    stem: str
    columns: Columns = field(default_factory=Columns)
    classes: tuple[str, ...] | None = None
    """Names of the labels, which are the same in all files."""

    @property
    def name(self) -> str:
        """The spec of this file alone."""
        return f"parquet:{self.path}"

    @property
    def fingerprint(self) -> str:
        """A digest of the name and size of the file, its columns and its row groups."""
        return self._index.fingerprint

    @property
    def fault(self) -> str | None:
        """The reason why no row can be used, if none can."""
        return self._index.fault

    def __len__(self):
        return int(self._index.starts[-1])

    def __getitem__(self, index: int) -> Record:
        """Read a row. Raises `BadRecord` if it is too large."""
        record: Record = {"key": self.key(index)}
        image_id = self._value("image_id", index)
        if image_id is not None:
            record["image_id"] = clean(str(image_id))
        if captions := self._captions(index):
            record |= texts_with_origins(captions, self._value(self._index.origin, index))
        if self.classes is not None:
            record["label"] = self._value(self._index.label, index)
        image = self._value(self._index.image, index)
        if isinstance(image, list):
            if len(image) > 1:
                raise BadRecord("malformed", f"it has {len(image)} images; expected one")
            image = image[0] if image else None
        image = image["bytes"] if isinstance(image, dict) else image  # its path is untrusted and is not followed
        if image is None:
            return record
        if len(image) > LARGEST_IMAGE:
            raise BadRecord("too large", f"its image has {len(image)} bytes; at most {LARGEST_IMAGE} are read")
        return record | {"image": image}

    def key(self, index: int) -> str:
        """Return the name of the file without its suffix, and the `key` of the row or its number."""
        key = self._value("key", index)
        return f"{self.stem}/{index if key is None else printable(str(key))}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions; images are not read."""
        return usable_texts(self._captions(index))

    def _captions(self, index: int) -> Any:
        """Return the value of the first caption column with a text; None if there is none."""
        for column in self._index.captions:
            value = self._value(column, index)
            texts = usable_texts(value)
            if any(len(text) > LARGEST_TEXT for text in texts):
                raise BadRecord("too large", f"a text has more than {LARGEST_TEXT} bytes")
            if texts:
                return value
        return None

    def _value(self, column: str | None, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if column is None or column not in self._index.names:
            return None
        group = int(np.searchsorted(self._index.starts, index, "right")) - 1
        changed = 0 if is_bucket(self.path) else self.path.stat().st_mtime_ns
        rows = _column(self.path, changed, group, column)
        return rows[index - int(self._index.starts[group])].as_py()

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark on columns that may have captions, if it is not clear which do."""
        return self._index.notes

    @property
    def has_origins(self) -> bool:
        """True if there is a column with the origins of captions."""
        return self._index.origin is not None

    @property
    def own_classes(self) -> tuple[str, ...] | None:
        """The classes that the file itself names."""
        return self._index.classes

    @cached_property
    def _index(self) -> _Index:
        fields, names, starts, schema = _Fields("", ()), (), np.zeros(1, np.int64), ""
        fault = None
        try:
            with open_data(self.path) as opened, pq.ParquetFile(opened) as file:
                names = tuple(file.schema_arrow.names)
                rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                fields, schema = _columns(file.schema_arrow, self.columns), str(file.schema_arrow.remove_metadata())
            if min(rows, default=0) < 0:
                raise DataError(f"it claims {min(rows)} rows")
            if self.classes not in (None, fields.classes):
                raise DataError("its classes are not those of the first file")
            starts = np.cumsum([0, *rows])
        except (pa.ArrowException, OSError, DataError) as error:
            fault = f"it cannot be read as Parquet with images: {str(error).splitlines()[0]}"
            log.warning("%s: %s", self.path, fault)
        size = self.path.stat().st_size
        chosen = [str(self.columns)] if self.columns.chosen else []
        origin = next(iter(self.columns.candidates("origin", names)), None)
        return _Index(fields.image, fields.captions, origin, fields.label, fields.classes, fields.notes, names, starts,
                      fingerprint([self.path.name, size, schema, *starts, *chosen]), fault)


@functools.lru_cache(maxsize=2 * CACHED_GROUPS)
def _column(path: Path, changed: int, group: int, column: str) -> pa.ChunkedArray:
    """Read a column of a row group. `changed`, the modification time of the file, is part of the cache's key."""
    with open_data(path) as opened, pq.ParquetFile(opened) as file:
        parts = file.metadata.row_group(group)
        size = sum(part.total_uncompressed_size for part in map(parts.column, range(parts.num_columns))
                   if part.path_in_schema.split(".")[0] == column)
        if size > LARGEST_GROUP:
            raise BadRecord("too large", f"row group {group} has {size} bytes of {column}; at most {LARGEST_GROUP} "
                                         "are read")
        return file.read_row_group(group, columns=[column]).column(0)


def open_parquet(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open each file that the pattern `location` matches as one shard. Raises `DataError`."""
    place = read_location(spec, location, ("image", "caption", "origin", "label"))
    files = [File(path, stem, place.columns) for path, stem in find_files(spec, place.path, (".parquet",))]
    first = next((file for file in files if not file.fault), files[0])
    if first.fault and len(files) == 1:
        raise DataError(f"source {spec!r}: {first.path}: {first.fault}")
    if first.own_classes is not None:
        files = [replace(file, classes=first.own_classes) for file in files]
    return Shards(name=spec, parts=tuple(files), classes=first.own_classes, notes=first.notes)


@dataclass(frozen=True)
class _Fields:
    """The columns of a schema."""

    image: str
    captions: tuple[str, ...]
    label: str | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def _columns(schema: pa.Schema, columns: Columns) -> _Fields:
    """Return the columns of images, captions and labels. Raises `DataError` if it is not clear which has the images."""
    names = {field.name: field.type for field in schema}
    missing = [column for column in columns.chosen.values() if column not in names]
    if missing:
        raise DataError(f"none of its columns {', '.join(names)} is {', '.join(missing)}")
    with_bytes = [name for name, kind in names.items() if _holds(kind, "bytes")]
    images = columns.candidates("image", with_bytes) or with_bytes
    if not images or ("image" in columns.chosen and columns.chosen["image"] not in with_bytes):
        raise DataError(f"none of its columns {', '.join(names)} has images (bytes, or structs of `bytes`)")
    if len(images) > 1 and images == with_bytes and not columns.candidates("image", with_bytes):
        raise DataError(f"its columns {', '.join(images)} may be images; name one, as in @image={images[0]}")
    labels = _class_labels(schema)
    captions, notes = _captions(names, columns, bool(labels))
    label = columns.chosen.get("label")
    if label is None and not captions and labels:
        if len(labels) > 1 and "label" not in labels:
            raise DataError(f"its columns {', '.join(labels)} have classes; name one, as in "
                            f"@label={next(iter(labels))}")
        label = "label" if "label" in labels else next(iter(labels))
    if label is not None and label not in labels:
        raise DataError(f"its column {label} has no names of classes (a ClassLabel of the Hub)")
    return _Fields(images[0], tuple(captions), label, None if label is None else labels[label], notes)


def _captions(names: Mapping[str, pa.DataType], columns: Columns, labelled: bool) -> tuple[list[str], tuple[str, ...]]:
    """Return the caption columns, and notes. One of an unknown name is taken if no other has text."""
    with_text = [name for name, kind in names.items() if _holds(kind, "text")]
    captions = columns.candidates("caption", with_text, FIRST)
    if captions or labelled:
        return captions, ()
    if columns.candidates("question", with_text):
        return [], ("it has questions, which are not read from Parquet; expected vqa:FILE with JSON, CSV or TSV",)
    others = [name for name in with_text if not set(re.split(r"[\W_]+", name.lower())) & set(NOT_CAPTIONS)]
    if len(others) == 1:
        return others, (f"captions are read from the column {others[0]}",)
    if others:
        return [], (f"none of its columns {', '.join(others)} is known to have captions; name one, as in "
                    f"@caption={others[0]}",)
    return [], tuple(f"its column {label} has no names of classes (a ClassLabel of the Hub) and is not read"
                     for label in columns.candidates("label", names)[:1])


def _class_labels(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of every column that the Hub's metadata describe as labels."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: tuple(map(printable, feature["names"])) for name, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds(kind: pa.DataType, what: str) -> bool:
    """Return whether a column has encoded images ("bytes") or "text", perhaps in dictionaries, lists or structs."""
    if pa.types.is_dictionary(kind):
        return _holds(kind.value_type, what)
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
                                   pa.types.is_list_view, pa.types.is_large_list_view)):
        return _holds(kind.value_type, what)
    if pa.types.is_struct(kind):
        names = ("bytes",) if what == "bytes" else TEXT_NAMES
        return any(kind.get_field_index(name) >= 0 and _holds(kind.field(name).type, what) for name in names)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view) if what == "bytes" else (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)
