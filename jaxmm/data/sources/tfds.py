"""Read TFDS data sets that are prepared as ArrayRecord, without TensorFlow."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.cleaning import texts_with_origins
from jaxmm.data.sources.columns import Columns, read_location
from jaxmm.paths import cache_limit, is_bucket, local_copy, user_path

CAPTIONS = ("captions", "caption", "texts", "text")
"""Names of features with captions. The first one that a data set has is used."""
WRITTEN_BY_US = "Written by jaxmm."
"""The description of the data sets that `tools.writing` writes: their `image_id` is a digest of the pixels."""

CLASS_NAMES = ("pythonClassName", "python_class_name", "type")
"""Keys of a `features.json` under which TFDS finds the class of a feature, whose module it imports."""

_NAMESPACE = re.compile(r"[\w-]{2,}:(?![\d*])")
_NAME_SPLIT = re.compile(r"(.+):([^:\[\]+]+(?:\[[^\]]*\])?(?:\+[^:\[\]+]+(?:\[[^\]]*\])?)*)")


@dataclass(frozen=True, kw_only=True)
class TfdsSource(Source):
    """A split of a TFDS data set. Images stay encoded until the pipeline decodes them."""

    name: str
    data: Any = field(repr=False)
    image: str
    """The name of the feature with the image."""
    captions: str | None
    origins: str | None
    """The name of the feature with the origins of captions."""
    classes: tuple[str, ...] | None
    keys: bool
    """True if examples have a text feature `key`."""
    scope: str | None
    """The name of the data set without the split; None if this library wrote it."""
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        """Read one example."""
        example = self.data[index]
        key = _text(example["key"]) if self.keys else self.key(index)
        record: Record = {"key": key, "image": example[self.image]}
        if self.classes is not None:
            record["label"] = int(example["label"])
        if self.captions is not None:
            record |= texts_with_origins(example[self.captions], example[self.origins] if self.origins else ())
        if "image_id" in example:
            record["image_id"] = _text(example["image_id"])
        return record

    @property
    def has_origins(self) -> bool:
        """True if examples say where their captions come from."""
        return self.origins is not None

    @property
    def image_id_scope(self) -> str | None:
        """The data set, or None if its `image_id` is a digest of the pixels."""
        return self.scope

    def key(self, index: int) -> str:
        """Return the key of the example, else the source and the record number."""
        return _text(self.data[index]["key"]) if self.keys else f"{self.name}#{index}"


def open_tfds(spec: str, location: str, data_dir: str | None = None) -> TfdsSource:
    """Open `NAME:SPLIT`. NAME may have a config and a version (`coco/2014:1.1.0`) or be the prepared folder itself.

    `data_dir`, else `TFDS_DATA_DIR`, is the folder of prepared data sets. Nothing is downloaded. Raises `DataError`.
    """
    place = read_location(spec, location, ("image", "caption", "origin"))
    parts = _NAME_SPLIT.fullmatch(place.path)
    if not parts:
        raise DataError(f"source {spec!r}: expected tfds:NAME:SPLIT")
    name, split = parts.groups()
    if _NAMESPACE.match(name) and not is_bucket(name):
        raise DataError(f"source {spec!r}: {name!r} is in a namespace, from which TFDS would download and run code; "
                        "expected the name of a data set of TFDS itself, or the folder of a prepared one")
    try:
        folder = _readable_folder(user_path(name), split) if is_bucket(name) else Path(name)
        if (folder / "dataset_info.json").is_file():
            builder = _open_folder(folder)
        else:
            for features in _prepared(name, data_dir):
                _check_features(features.parent)
            builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS raises many types, and some messages list every known data set
        raise DataError(f"source {spec!r}: TFDS has no data set {name!r} in {data_dir or 'its data folder'}: "
                        f"{str(error).splitlines()[0]}") from None
    return _from_builder(builder, split, spec, f"tfds:{name}", place.columns)


def _prepared(name: str, data_dir: str | None) -> Iterator[Path]:
    """Yield the `features.json` of every prepared version of the data set `name`."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    base = re.split("[/:]", name)[0].replace("_", "").lower()  # it may be written as the name of a class
    for folder in root.glob("*"):
        if folder.name.replace("_", "") == base:
            yield from folder.rglob("features.json")


def _open_folder(folder: Path) -> tfds.core.DatasetBuilder:
    """Return the builder of the data set in `folder`, whose features are checked before TFDS reads them."""
    _check_features(folder)
    return tfds.builder_from_directory(folder)


def _check_features(folder: Path) -> None:
    """Raise `ValueError` if a feature of the data set in `folder` has a class whose module would be imported for it."""
    for name in _feature_classes(json.loads((folder / "features.json").read_text())):
        module = name.rpartition(".")[0]
        if not module.startswith("tensorflow_datasets.") and module not in sys.modules:
            raise ValueError(f"features.json names the class {name}; expected one of TFDS, or import {module} first")


def _feature_classes(value: Any) -> Iterator[str]:
    """Yield the names of classes in the contents of a `features.json`."""
    if isinstance(value, dict):
        yield from (name for key, name in value.items() if key in CLASS_NAMES and isinstance(name, str) and "." in name)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _feature_classes(inner)


def _readable_folder(folder: Path, split: str) -> Path:
    """Return a folder where ArrayRecord's reader finds `split`: a local copy of its shards in a bucket, and no others.

    The reader itself reads `gs://`, without a cache: a split that is larger than the cache stays there.
    """
    copy = local_copy(folder, lambda name: "/" not in name and "-of-" not in name)
    splits = _open_folder(copy).info.splits
    try:
        shards = set(splits[split].filenames)
    except (KeyError, ValueError):  # no such split, which is said when it is opened
        return copy
    sizes = folder.request("du", total=False)
    size = sum(count for name, count in sizes.items() if name.rpartition("/")[2] in shards)
    if size <= cache_limit():
        return local_copy(folder, lambda name: name in shards)
    if str(folder).startswith("gs://"):
        return folder
    raise OSError(f"the split has {size / 2**30:.1f} GiB, more than the local cache; expected JAXMM_BUCKET_CACHE or a "
                  "disk that is large enough")


def _from_builder(builder: tfds.core.DatasetBuilder, split: str, spec: str, scope: str, columns: Columns) -> TfdsSource:
    if not builder.info.splits:
        raise DataError(f"source {spec!r}: {builder.info.full_name} is not prepared in {builder.data_dir}; expected "
                        "download_and_prepare(file_format='array_record') there first")
    features = dict(builder.info.features)
    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)
              and columns.chosen.get("image", name) == name]
    if not images:
        raise DataError(f"source {spec!r}: none of its features {sorted(features)} is "
                        f"{columns.chosen.get('image', 'an image')}")
    if columns.chosen.get("caption", images[0]) not in features:
        raise DataError(f"source {spec!r}: none of its features {sorted(features)} is {columns.chosen['caption']}")
    try:
        data = builder.as_data_source(split=split, decoders={images[0]: tfds.decode.SkipDecoding()})
        count = len(data)
    except NotImplementedError:
        raise DataError(f"source {spec!r} is prepared as {builder.info.file_format}; expected array_record: prepare it "
                        "with file_format='array_record'") from None
    except Exception as error:
        raise DataError(f"source {spec!r}: cannot open split {split!r}: {error}") from None
    label = features.get("label")
    captions = columns.chosen.get("caption") or next((name for name in CAPTIONS if name in features), None)
    return TfdsSource(
        name=spec, data=data, image=images[0],
        captions=captions, origins=next(iter(columns.candidates("origin", features)), None) if captions else None,
        classes=tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None,
        keys=isinstance(features.get("key"), tfds.features.Text),
        scope=None if builder.info.description == WRITTEN_BY_US else scope,
        fingerprint=fingerprint([builder.info.full_name, split, count,
                                 *(s.shard_lengths for s in builder.info.splits.values()),
                                 *([str(columns)] if columns.chosen else [])]),
    )


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
