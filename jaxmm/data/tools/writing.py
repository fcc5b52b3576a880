"""Write TFDS data sets of ArrayRecord shards, without TensorFlow. A shard is complete or does not exist.

Shards are written into `FOLDER/work` in any order, by any process. `finish` writes the description that TFDS reads,
gives the shards their names and renames the folder. The same examples make the same bytes.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from jaxmm.data.base import DataError
from jaxmm.data.sources.tfds import WRITTEN_BY_US
from jaxmm.folder_locks import LOCK
from jaxmm.paths import is_bucket, move_file, new_folder, remove_tree, staging_folder

WORK = "work"
INFO = "dataset_info.json"
VERSION = "1.0.0"

Features = tfds.features.FeaturesDict
ORIGINS = {"origins": tfds.features.Sequence(tfds.features.Text())}
"""The feature that says where each of the texts comes from."""


@dataclass(frozen=True)
class Written:
    """A complete shard."""

    path: Path
    records: int
    bytes: int
    """The bytes of the examples, as TFDS counts them."""


def image_features(classes: Sequence[str] | None = None, **more: tfds.features.FeatureConnector) -> Features:
    """Return the features `key`, `image` (encoded), `image_id` and `texts`, with `classes` a `label`, and `more`."""
    label = {} if classes is None else {"label": tfds.features.ClassLabel(names=list(classes))}
    return Features({"key": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3)),
                     "image_id": tfds.features.Text(), "texts": tfds.features.Sequence(tfds.features.Text()),
                     **label, **more})


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return the path of shard `number` of `split` before `finish`."""
    return folder / WORK / f"{split}-{number:05d}.array_record"


def write_shard(examples: Iterable[Mapping[str, Any]], path: Path, features: Features) -> Written:
    """Write `examples` of `features` to an ArrayRecord file, which appears when it is complete, if there are any.

    Raises `OSError` if it cannot be written.
    """
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    part = staging_folder(path)
    path.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(part), "group_size:1")
    records = size = 0
    try:
        for example in examples:
            # TFDS's own serialize_example writes the features in random order
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
    count = reader.num_records()
    reader.close()
    if count != records:
        raise OSError(f"{part} has {count} records of the {records} that were written; is the disk full?")
    move_file(part, path)
    return Written(path, records, size)


def finish(folder: Path, dest: Path, features: Features, splits: Mapping[str, Sequence[Written]]) -> None:
    """Make the shards in `folder` a data set that `tfds.builder_from_directory(dest)` reads, with the name of `dest`.

    Shards without records get no number. If this is interrupted, the shards that have left the work folder must be
    written again. Raises `DataError` if a split has no records.
    """
    name = re.sub(r"\W", "_", dest.resolve().name.lower(), flags=re.ASCII)
    name = name if name[0].isalpha() else f"data_{name}"
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, filetype_suffix="array_record")
    infos, names = [], {}
    for split, shards in splits.items():
        kept = [shard for shard in shards if shard.records]
        if not kept:
            raise DataError(f"{dest}: no record of split {split!r} can be used")
        info = tfds.core.SplitInfo(
            name=split, shard_lengths=[shard.records for shard in kept], num_bytes=sum(shard.bytes for shard in kept),
            filename_template=template.replace(split=split))
        infos.append(info)
        names |= {shard.path: os.path.basename(final) for final, shard in zip(info.filepaths, kept, strict=True)}
    info = tfds.core.DatasetInfo(features=features, description=WRITTEN_BY_US, builder=DatasetIdentity(
        name=name, version=tfds.core.utils.Version(VERSION), data_dir=str(folder), module_name=""))
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    if is_bucket(dest):  # a data set is complete with its dataset_info.json
        for path, final in names.items():
            path.replace(dest / final)
        with new_folder(dest, last=INFO) as part:
            info.write_to_directory(part)
            for path in folder.iterdir():
                if path.is_file():
                    path.download(part / path.name)
        for path in folder.files():
            if path.parent.name != LOCK:  # which its owner removes
                path.unlink(missing_ok=True)
        return
    info.write_to_directory(folder)
    for old in folder.glob("*.array_record-*"):  # of an interrupted call
        old.unlink()
    for path, final in names.items():
        path.replace(folder / final)
    folder.rename(dest)
    remove_work(dest)


def is_complete(dest: Path) -> bool:
    """Return whether `finish` has made the data set `dest`."""
    return (dest / INFO).exists() if is_bucket(dest) else dest.exists()


def remove_work(dest: Path) -> None:
    """Remove the work folder of a finished data set."""
    with contextlib.suppress(OSError):
        remove_tree(dest / WORK, missing_ok=True)
