"""Texts of images with their scores: one Parquet file per shard, complete or absent.

Its metadata has `made_from`, a digest of everything that the file was made from, so that a stage that runs again skips
what is done, and the records that could not be used. The same rows give the same bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxmm.atomic import atomic_file
from jaxmm.data.base import DataError

COLUMNS = {
    "record": pa.int64(),               # number of the record in its shard
    "key": pa.string(),
    "image_id": pa.string(),
    "text": pa.string(),
    "origin": pa.string(),              # web, synthetic, human
    "captioner": pa.int16(),            # number of the captioner
    "log_probability": pa.float32(),    # mean over the tokens of a synthetic caption
    "itm": pa.float32(),                # probability that text and image belong together
    "itc": pa.float32(),                # cosine of text and image
    "embedding": pa.binary(),           # of an image, float16; in the files of `embeddings/` only
    "near_duplicate": pa.bool_(),       # the image is nearly the same as another one
    "kept": pa.bool_(),
    "why": pa.string(),                 # a key of `selection.REASONS`
}
"""Names and types in order. A stage adds columns to those of the stage before. Scores of filters with a name are
float32 columns of that name, behind `itc`."""

CAPTIONED = tuple(COLUMNS)[:7]
SCORED = tuple(COLUMNS)[:9]


def score_names(columns: Iterable[str]) -> tuple[str, ...]:
    """Return the names of scores among those of columns."""
    return tuple(name for name in columns if name in ("itm", "itc") or name not in COLUMNS)


@dataclass(frozen=True)
class Texts:
    """The texts of one shard: named columns of equal length; None is null."""

    columns: Mapping[str, Any]
    """Lists or arrays."""
    images: int = 0
    """Number of images that could be used."""
    bad: Mapping[str, int] = field(default_factory=dict)
    """Number of records that could not, by reason."""
    examples: Sequence[tuple[str, str]] = ()
    """Key and reason of the first bad records."""

    def __len__(self):
        return len(self.columns["key"])

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column; numbers that are null are NaN."""
        return np.asarray(self.columns[name], {pa.float32(): np.float32}.get(COLUMNS.get(name, pa.float32())))


def write_texts(path: Path, texts: Texts, made_from: str) -> None:
    """Write `texts` atomically to `path`."""
    notes = {"made_from": made_from, "pictures": texts.images, "bad": dict(texts.bad),
             "examples": [list(example) for example in texts.examples]}
    names = [name for name in COLUMNS if name in texts.columns]
    scores = [name for name in texts.columns if name not in COLUMNS]
    names = [*(name for name in names if name in SCORED), *scores, *(name for name in names if name not in SCORED)]
    schema = pa.schema([(name, COLUMNS.get(name, pa.float32())) for name in names],
                       metadata={"jaxmm": json.dumps(notes, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({field.name: pa.array(texts.columns[field.name], field.type, from_pandas=True)
                      for field in schema}, schema=schema)
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_texts(path: Path, columns: Sequence[str] | None = None) -> Texts:
    """Read what `write_texts` wrote. Raise `DataError` for anything else."""
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=None if columns is None else list(columns))
        notes = json.loads(table.schema.metadata[b"jaxmm"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not what CapFilt writes: {error}") from None
    columns = {name: table[name].to_numpy() if pa.types.is_floating(table[name].type) else table[name].to_pylist()
               for name in table.column_names}
    return Texts(columns, notes["pictures"], notes["bad"], [tuple(example) for example in notes["examples"]])


def made_from(path: Path) -> str | None:
    """Return the digest of what the file was made from; None if there is no complete file."""
    try:
        with path.open("rb") as file:
            return json.loads(pq.read_schema(file).metadata[b"jaxmm"])["made_from"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def digest(*parts: Any) -> str:
    """Return the digest of JSON values, whatever the order of their keys."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def totals(tables: Sequence[Texts]) -> tuple[int, Counter]:
    """Return how many images of all shards could be used, and how many could not by reason."""
    bad: Counter = Counter()
    for table in tables:
        bad.update(table.bad)
    return sum(table.images for table in tables), bad
