"""TFDS data sets of ArrayRecord shards, written without TensorFlow, each shard whole or not there.

Shards are written into `FOLDER/work` in any order, by any process; `finish` gives them their names, writes what TFDS
wants to know, and renames the folder. The same examples make the same bytes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from jaxmm.atomic import write_atomically
from jaxmm.data.base import DataError

WORK, MOVES = "work", "moves.json"
VERSION = "1.0.0"

Features = tfds.features.FeaturesDict


@dataclass(frozen=True)
class Written:
    """A shard that is whole."""

    path: Path
    records: int
    bytes: int
    """Of the examples, as TFDS counts them."""


def picture_features(classes: Sequence[str] | None = None, **more: tfds.features.FeatureConnector) -> Features:
    """`key`, `image` (encoded), `image_id`, `texts`; with `classes` a `label`; and `more`."""
    label = {} if classes is None else {"label": tfds.features.ClassLabel(names=list(classes))}
    return Features({"key": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3)),
                     "image_id": tfds.features.Text(), "texts": tfds.features.Sequence(tfds.features.Text()),
                     **label, **more})


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where shard `number` of `split` lies until `finish`."""
    return folder / WORK / f"{split}-{number:05d}.array_record"


def write_shard(examples: Iterable[Mapping[str, Any]], path: Path, features: Features) -> Written:
    """Writes `examples` of `features` to an ArrayRecord file, which is there when all of it is; none for no example.

    Raises `OSError` where it cannot be written.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    part = path.with_name(path.name + ".part")
    path.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(part), "group_size:1")
    records = size = 0
    try:
        for example in examples:
            # TFDS's own serialize_example orders the features by chance
            data = serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)
            writer.write(data)
            records, size = records + 1, size + len(data)
    finally:
        writer.close()
    if not records:
        part.unlink()
        return Written(path, 0, 0)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    reader = ArrayRecordReader(str(part))
    found = reader.num_records()
    reader.close()
    if found != records:
        raise OSError(f"{part} holds {found} records of the {records} that were written; is the disk full?")
    part.replace(path)
    return Written(path, records, size)


def finish(folder: Path, dest: Path, features: Features, splits: Mapping[str, Sequence[Written]]) -> None:
    """Makes the shards in `folder` a data set that `tfds.builder_from_directory(dest)` reads, named as `dest` is.

    Shards without a record are left out of the numbering. Raises `DataError` for a split without records.
    """
    name = re.sub(r"\W", "_", dest.resolve().name.lower(), flags=re.ASCII)
    name = name if name[0].isalpha() else f"data_{name}"
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="array_record")
    infos, moves = [], {}
    for split, shards in splits.items():
        kept = [shard for shard in shards if shard.records]
        if not kept:
            raise DataError(f"{dest}: no record of split {split!r} can be used")
        info = tfds.core.SplitInfo(
            name=split, shard_lengths=[shard.records for shard in kept], num_bytes=sum(shard.bytes for shard in kept),
            filename_template=template.replace(split=split))
        infos.append(info)
        moves |= {os.path.basename(final): shard.path.name for final, shard in zip(info.filepaths, kept, strict=True)}
    write_atomically(folder / WORK / MOVES, json.dumps(moves))
    for final, worked in moves.items():
        (folder / WORK / worked).replace(folder / final)
    info = tfds.core.DatasetInfo(features=features, description="Written by jaxmm.", builder=DatasetIdentity(
        name=name, version=tfds.core.utils.Version(VERSION), data_dir=str(folder), module_name=""))
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    folder.rename(dest)
    remove_work(dest)


def take_back(folder: Path) -> None:
    """Takes back the names that an interrupted `finish` gave, so that all shards are in the work folder again."""
    moves = folder / WORK / MOVES
    if moves.exists():
        for final, worked in json.loads(moves.read_text()).items():
            if (folder / final).exists():
                (folder / final).replace(folder / WORK / worked)
        moves.unlink()


def remove_work(dest: Path) -> None:
    """Removes what is not needed any more in a finished data set."""
    shutil.rmtree(dest / WORK, ignore_errors=True)
