"""Texts of pictures, with what was found out about them: a Parquet file a shard, whole or not there.

A file says in its metadata what it was made from (`made_from`, a digest), so that a stage that runs again passes over
what is done, and which pictures could not be used. The same rows give the same bytes.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmm.data.base import DataError

COLUMNS = {
    "record": pa.int64(),               # number in its shard
    "key": pa.string(),
    "image_id": pa.string(),
    "text": pa.string(),
    "origin": pa.string(),              # web, synthetic, human
    "captioner": pa.int16(),            # number of the captioner that wrote it
    "log_probability": pa.float32(),    # of what was written, the mean of its tokens
    "itm": pa.float32(),                # probability that it belongs to the picture
    "itc": pa.float32(),                # cosine with the picture
    "kept": pa.bool_(),
    "why": pa.string(),                 # a key of `select.REASONS`
}
"""Names and types in order. A stage adds columns to those of the stage before."""

WRITTEN = tuple(COLUMNS)[:7]
SCORED = tuple(COLUMNS)[:9]
SELECTED = tuple(COLUMNS)


@dataclass(frozen=True)
class Texts:
    """The texts of one shard: a column a name, all of one length; None is null."""

    columns: Mapping[str, Any]
    """Lists, or arrays."""
    pictures: int = 0
    """That could be used."""
    bad: Mapping[str, int] = field(default_factory=dict)
    """How many could not, by reason."""
    examples: Sequence[tuple[str, str]] = ()
    """The first of those: key and reason."""

    def __len__(self):
        return len(self.columns["key"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column; numbers that are null are NaN."""
        return np.asarray(self.columns[name], {pa.float32(): np.float32}.get(COLUMNS[name]))


def write_texts(path: Path, texts: Texts, made_from: str) -> None:
    """Writes `texts` in one piece. Nothing that is half-written has that name."""
    notes = {"made_from": made_from, "pictures": texts.pictures, "bad": dict(texts.bad),
             "examples": [list(each) for each in texts.examples]}
    schema = pa.schema([(name, COLUMNS[name]) for name in COLUMNS if name in texts.columns],
                       metadata={"jaxmm": json.dumps(notes, sort_keys=True)})
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(texts.columns[name], COLUMNS[name], from_pandas=True) for name in schema.names},
                     schema=schema)
    with part.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_texts(path: Path, columns: Sequence[str] | None = None) -> Texts:
    """What `write_texts` wrote. Raises `DataError`."""
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns))
        notes = json.loads(table.schema.metadata[b"jaxmm"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not what CapFilt writes: {error}") from None
    found = {name: table[name].to_numpy() if pa.types.is_floating(table[name].type) else table[name].to_pylist()
             for name in table.column_names}
    return Texts(found, notes["pictures"], notes["bad"], [tuple(each) for each in notes["examples"]])


def made_from(path: Path) -> str | None:
    """What the file says that it was made from; None where there is no whole file."""
    try:
        return json.loads(pq.read_schema(path).metadata[b"jaxmm"])["made_from"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def digest(*parts: Any) -> str:
    """Of JSON values, the order of whose keys does not matter."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def totals(tables: Sequence[Texts]) -> tuple[int, Counter]:
    """Pictures that could be used, and how many could not by reason, of all shards."""
    bad: Counter = Counter()
    for each in tables:
        bad.update(each.bad)
    return sum(each.pictures for each in tables), bad
