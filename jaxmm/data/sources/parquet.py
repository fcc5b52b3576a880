"""Read Parquet files with encoded images, as Hugging Face data sets and img2dataset write them."""

import functools
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.sources.shards import LARGEST_IMAGE, LARGEST_TEXT, Shards, clean, open_files, printable

log = logging.getLogger(__name__)

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "bytes")
"""Names of the image column. The first one with bytes, or with structs of `bytes`, is used."""
CAPTIONS = ("texts", "captions", "text", "caption")
"""Names of the caption column. The first one with texts or lists of texts is used."""
LARGEST_GROUP = 2**31
"""Uncompressed bytes of one column in a row group; records of larger ones are refused as too large."""
CACHED_GROUPS = 4
"""The number of row groups that stay in memory."""


@dataclass(frozen=True)
class _Index:
    image: str
    captions: str | None
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
        if texts := self.texts(index):
            record["texts"] = texts
        image = self._value(self._index.image, index)
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
        value = self._value(self._index.captions, index)
        texts = value if isinstance(value, list) else [value]
        if any(len(text) > LARGEST_TEXT for text in texts if text is not None):
            raise BadRecord("too large", f"a text has more than {LARGEST_TEXT} bytes")
        return tuple(clean(text) for text in texts if text is not None)

    def _value(self, column: str | None, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if column is None or column not in self._index.names:
            return None
        group = int(np.searchsorted(self._index.starts, index, "right")) - 1
        rows = _column(self.path, self.path.stat().st_mtime_ns, group, column)
        return rows[index - int(self._index.starts[group])].as_py()

    @cached_property
    def _index(self) -> _Index:
        try:
            with pq.ParquetFile(self.path) as file:
                image, captions = _columns(file.schema_arrow)
                rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                schema = str(file.schema_arrow.remove_metadata())
            starts, fault, names = np.cumsum([0, *rows]), None, tuple(file.schema_arrow.names)
        except (pa.ArrowException, OSError, DataError) as error:
            image, captions, names, starts, schema = "", None, (), np.zeros(1, np.int64), ""
            fault = f"it cannot be read as Parquet with images: {str(error).splitlines()[0]}"
            log.warning("%s: %s", self.path, fault)
        size = self.path.stat().st_size
        return _Index(image, captions, names, starts, fingerprint([self.path.name, size, schema, *starts]), fault)


@functools.lru_cache(maxsize=2 * CACHED_GROUPS)
def _column(path: Path, changed: int, group: int, column: str) -> pa.ChunkedArray:
    """Read a column of a row group. `changed`, the modification time of the file, is part of the cache's key."""
    with pq.ParquetFile(path) as file:
        parts = file.metadata.row_group(group)
        size = sum(part.total_uncompressed_size for part in map(parts.column, range(parts.num_columns))
                   if part.path_in_schema.split(".")[0] == column)
        if size > LARGEST_GROUP:
            raise BadRecord("too large", f"row group {group} has {size} bytes of {column}; at most {LARGEST_GROUP} "
                                         "are read")
        return file.read_row_group(group, columns=[column]).column(0)


def open_parquet(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open each file that the pattern `location` matches as one shard. Raises `DataError`."""
    source = open_files(spec, location, ".parquet", File)
    first = source.parts[0]
    if first.fault and len(source.parts) == 1:
        raise DataError(f"source {spec!r}: {first.path}: {first.fault}")
    return source


def _columns(schema: pa.Schema) -> tuple[str, str | None]:
    """Return the names of the image and caption columns. Raises `DataError` if there is no image column."""
    image = next((name for name in IMAGES if name in schema.names and _holds_bytes(schema.field(name).type)), None)
    if image is None:
        raise DataError(f"none of its columns {', '.join(schema.names)} is {', '.join(IMAGES)} with bytes")
    return image, next((name for name in CAPTIONS if name in schema.names and _holds_text(schema.field(name).type)),
                       None)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
