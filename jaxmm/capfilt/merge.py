"""The fourth stage: write what stays and the human captions as a TFDS data set (Li et al. 2022, section 3.3).

`merged/` has the splits `web` and `human`, with one image per record and all of its texts that stay.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmm.atomic import write_atomically
from jaxmm.capfilt.stages import SELECTED, VERSION, Folder, Shard, progress_bar
from jaxmm.capfilt.tables import Texts, digest, file_digest, read_texts
from jaxmm.data import images
from jaxmm.data.bad_records import read_record
from jaxmm.data.tools.importing import png
from jaxmm.data.tools.writing import (
    ORIGINS,
    WORK,
    Written,
    finish,
    image_features,
    is_complete,
    shard_path,
    write_shard,
)
from jaxmm.hosts.startup import barrier, heartbeat
from jaxmm.paths import remove_tree

MERGED, NOTES = "merged", "merged.json"


def merge(folder: Folder) -> Path:
    """Write the data set, in place of one of an earlier selection, and return its folder.

    Raise `DataError` if nothing stays of a split.
    """
    folder.require_stage(SELECTED)
    dest = folder.path / MERGED
    made = {shard.name: _made_from(folder, shard) for shard in folder.shards}
    if _read(dest / NOTES) == made and is_complete(dest):
        barrier("merged")
        return dest
    part = dest.with_name(MERGED + ".part")
    if jax.process_index() == 0:
        (part / WORK).mkdir(parents=True, exist_ok=True)
    barrier("merge")
    features = image_features(**ORIGINS)
    mine = folder.shards[jax.process_index()::jax.process_count()]
    todo = [shard for shard in mine if not _is_written(part, shard, made[shard.name])]
    with progress_bar(MERGED, todo) as bar:
        for shard in todo:
            heartbeat("merging")
            _note(part, shard).unlink(missing_ok=True)
            texts = read_texts(folder.table(SELECTED, shard))
            written = write_shard(_examples(shard, texts), _path(part, shard), features)
            write_atomically(_note(part, shard), json.dumps(
                {"made_from": made[shard.name], "records": written.records, "bytes": written.bytes}))
            bar.update(len(shard.source))
    barrier("merge written")
    if jax.process_index() == 0:
        splits: dict[str, list[Written]] = {}
        for shard in folder.shards:
            note = _read(_note(part, shard))
            splits.setdefault(shard.origin, []).append(Written(_path(part, shard), note["records"], note["bytes"]))
        write_atomically(part / NOTES, json.dumps(made, indent=1))
        remove_tree(dest, missing_ok=True)  # of an earlier selection
        finish(part, dest, features, splits)
    barrier("merged")
    return dest


def merged_source(merged: Path, human_weight: int = 1) -> str:
    """Return the source to train on, in which each human record counts `human_weight` times per epoch."""
    splits = json.loads((merged / "dataset_info.json").read_text())["splits"]
    weight = {"web": "", "human": "" if human_weight == 1 else f"{human_weight}*"}
    names = sorted((split["name"] for split in splits), reverse=True)
    return " + ".join(f"{weight[name]}tfds:{merged}:{name}" for name in names)


def _examples(shard: Shard, texts: Texts) -> Iterator[dict[str, Any]]:
    """Yield the images of a shard that keep a text. Raise `DataError` for one that cannot be read any more."""
    kept = np.asarray(texts.columns["kept"], bool)
    record = np.asarray(texts.columns["record"], np.int64)
    for number in np.unique(record[kept]).tolist():
        rows = np.flatnonzero(kept & (record == number))
        row = read_record(shard.source, number)
        image, plain = images.read(row["image"])
        yield {"key": texts.columns["key"][rows[0]], "image": row["image"] if plain else png(image),
               "image_id": texts.columns["image_id"][rows[0]],
               "texts": [texts.columns["text"][i] for i in rows],
               "origins": [texts.columns["origin"][i] for i in rows]}


def _made_from(folder: Folder, shard: Shard) -> str:
    return digest(VERSION, shard.source.fingerprint, file_digest(folder.table(SELECTED, shard)))


def _is_written(part: Path, shard: Shard, made_from: str) -> bool:
    """Return whether the shard exists in the work folder and was made from `made_from`."""
    note = _read(_note(part, shard))
    return note.get("made_from") == made_from and (not note["records"] or _path(part, shard).exists())


def _path(part: Path, shard: Shard) -> Path:
    return shard_path(part, shard.origin, int(shard.name.rpartition("-")[2]))


def _note(part: Path, shard: Shard) -> Path:
    return _path(part, shard).with_suffix(".json")


def _read(path: Path) -> dict[str, Any]:
    """Return the contents of a note; {} if there is no complete one."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
