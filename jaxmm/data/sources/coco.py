"""Read COCO captions as COCO, Karpathy and the authors of BLIP publish them, and Flickr30k in Karpathy's layout."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from jaxmm.data.base import DataError, fingerprint
from jaxmm.data.cleaning import usable_texts
from jaxmm.data.sources.annotations import normal_ids, read_json
from jaxmm.data.sources.columns import read_location
from jaxmm.data.sources.files import Files
from jaxmm.data.sources.image_roots import find_root
from jaxmm.paths import exists, user_path

TRAIN = ("train", "restval")
"""Splits that `train` includes, as in BLIP: 113,287 images of COCO. Karpathy's own `train` is `train-only`."""

LAYOUTS = """none of the known layouts:
  COCO's: `images` with `id`, `file_name`; `annotations` with `image_id`, `caption`
  Karpathy's: `images` with `filename`, `split`, `sentences` with `raw`
  BLIP's: a list of objects with `image`, `caption`"""


@dataclass
class _Image:
    file: str
    captions: list[str] = field(default_factory=list)
    image_id: str | None = None
    fault: str | None = None
    """The reason why the entry cannot be read; `file` is its place then."""


@dataclass
class _Listed:
    images: list[_Image]
    notes: list[str] = field(default_factory=list)


def open_coco(spec: str, location: str, data_dir: str | None = None) -> Files:
    """Open one record per image, with all its captions, in the order of the file; Karpathy's layout: `FILE.json:SPLIT`.

    Split `train` includes `restval`, `train-only` does not; `a+b` is both. An entry that cannot be read is one bad
    record. Raises `DataError`.
    """
    if (behind := re.fullmatch(r"(.+\.json)@(.+):([^:/@]+)", location)) and user_path(behind[2]).is_dir():
        location = "{0}:{2}@{1}".format(*behind.groups())  # the split may also be behind the folder
    place = read_location(spec, location, exists=lambda path: "@" not in (_cut(path)[1] or "") and exists(
        _cut(path)[0]))
    path, split = _cut(place.path)
    read = read_json(spec, path)
    where = f"source {spec!r}: {path}"
    listed = _images(read.content, split, where)
    images = listed.images
    faults = {number: image.fault for number, image in enumerate(images) if image.fault}
    if images and len(faults) == len(images):
        raise DataError(f"{where}: {images[0].file} {images[0].fault}")
    root = find_root(spec, user_path(path), [["" if image.fault else image.file for image in images]], root=place.root,
                     split=split)
    notes = [*read.notes, *listed.notes, *root.notes]
    notes += [f"{len(faults)} of {len(images)} entries cannot be read"] if faults else []
    return Files(name=spec, root=root.path, files=[image.file for image in images], faults=faults, notes=tuple(notes),
                 captions=[tuple(image.captions) for image in images],
                 image_ids=[image.image_id for image in images], fingerprint=fingerprint([split, read.text]))


def _cut(location: str) -> tuple[str, str | None]:
    """Return the file and the split of `FILE.json:SPLIT`. The name of an existing file may contain a colon."""
    file, colon, split = location.rpartition(":")
    return (file, split) if colon and file.endswith(".json") and not (
        user_path(location).is_file()) else (location, None)


def _images(content: Any, split: str | None, where: str) -> _Listed:
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(content, list):
        layout, read = "BLIP's", _blip
    elif isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        layout, read = "Karpathy's", _karpathy
    elif images is not None:
        layout, read = "COCO's", _coco
    else:
        raise DataError(f"{where} is {LAYOUTS}")
    if read is not _karpathy and split is not None:
        raise DataError(f"{where} has {layout} layout, without splits; given {split!r}")
    try:
        return _karpathy(content, split, where) if read is _karpathy else read(content, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not {layout} captions layout: {type(error).__name__} {error}; it is "
                        f"{LAYOUTS}") from None


def _coco(content: dict, where: str) -> _Listed:
    listed, annotations = content["images"], [row for row in content["annotations"] if isinstance(row, dict)]
    ids, used = normal_ids([image.get("id") if isinstance(image, dict) else None for image in listed],
                           [row.get("image_id") for row in annotations])
    images, by_id = [], {}
    files_of: dict[str | None, set[str | None]] = {}
    for image, image_id in zip(listed, ids, strict=True):
        files_of.setdefault(image_id, set()).add(_file(image))
    for number, (image, image_id) in enumerate(zip(listed, ids, strict=True)):
        file = _file(image)
        fault = ("has no `file_name`" if file is None else "has no `id`" if image_id is None else
                 f"has the id {image_id} of another image" if len(files_of[image_id]) > 1 else None)
        images.append(_Image(file, [], str(image["id"])) if fault is None else _Image(
            f"`images`, entry {number}", fault=fault))
        by_id.setdefault(image_id, []).append(images[-1])
    without, lost, known = 0, [], 0
    for row, image_id in zip(annotations, used, strict=True):
        texts = usable_texts(row.get("caption"))
        without += not texts
        known += "caption" in row
        if image_id is None or image_id not in by_id:
            lost.append(row.get("image_id"))
            continue
        for image in by_id[image_id]:
            image.captions += texts
    if annotations and not known:
        raise DataError(f"{where} has no `caption` in its annotations, which have {', '.join(annotations[0])}")
    if annotations and len(lost) == len(annotations):
        raise DataError(f"{where}: no `image_id` of its {len(annotations)} annotations, such as {lost[0]!r}, is an "
                        f"`id` of its images, such as {next(iter(by_id), None)!r}")
    notes = [f"{len(lost)} of {len(annotations)} captions are of images that are not listed, such as image_id "
             f"{lost[0]!r}"] if lost else []
    return _Listed(images, notes + _empty(without, len(annotations)))


def _file(image: Any) -> str | None:
    """Return the file of an entry of `images`: its `file_name`, else the last part of its `coco_url`."""
    if not isinstance(image, dict):
        return None
    if isinstance(image.get("file_name"), str) and image["file_name"]:
        return image["file_name"]
    return os.path.basename(urlparse(str(image.get("coco_url") or "")).path) or None


def _karpathy(content: dict, split: str | None, where: str) -> _Listed:
    images = content["images"]
    splits = list(dict.fromkeys(image["split"] for image in images))
    if split is None and len(splits) > 1:
        raise DataError(f"{where} has the splits {', '.join(splits)}; expected one of them behind the file, "
                        f"as in FILE.json:{splits[0]}")
    chosen = splits if split is None else _chosen(split, splits, where)
    entries, without, total = [], 0, 0
    for number, image in enumerate(images):
        if image["split"] not in chosen:
            continue
        if not isinstance(image.get("filename"), str):
            entries.append(_Image(f"`images`, entry {number}", fault="has no `filename`"))
            continue
        sentences = image.get("sentences") or ()
        texts = [text for sentence in sentences for text in usable_texts(
            sentence.get("raw") if isinstance(sentence, dict) else sentence)]
        without, total = without + len(sentences) - len(texts), total + len(sentences)
        image_id = image["cocoid"] if "cocoid" in image else image.get("imgid")
        entries.append(_Image(str(Path(image.get("filepath") or "", image["filename"])), texts,
                            None if image_id is None else str(image_id)))
    return _Listed(entries, _empty(without, total))


def _chosen(split: str, splits: Sequence[str], where: str) -> set[str]:
    chosen: set[str] = set()
    for part in split.split("+"):
        known = [name for name in {"train": TRAIN, "train-only": ("train",)}.get(part, (part,)) if name in splits]
        if not known:
            raise DataError(f"{where} has no split {part!r}; expected one of {', '.join(splits)}")
        chosen.update(known)
    return chosen


def _blip(content: Iterable[Any], where: str) -> _Listed:
    """Read entries of one caption each (train), several per image, or of all captions of an image (val, test)."""
    images: dict[str, _Image] = {}
    without = total = 0
    for number, entry in enumerate(content):
        file = entry.get("image") if isinstance(entry, dict) else None
        fault = ("has no `image`" if not isinstance(file, str) or not file else
                 "has no `caption`" if "caption" not in entry else None)
        if fault is not None:
            images[f"\0{number}"] = _Image(f"entry {number}", fault=fault)
            continue
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        texts, given = usable_texts(captions), len(captions)
        without, total = without + given - len(texts), total + given
        image_id = entry.get("image_id")
        images.setdefault(file, _Image(file, [], None if image_id is None else str(image_id))).captions += texts
    return _Listed(list(images.values()), _empty(without, total))


def _empty(without: int, total: int) -> list[str]:
    return [f"{without} of {total} captions are null, blank or no text"] if without else []
