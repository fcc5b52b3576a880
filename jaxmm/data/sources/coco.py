"""Read COCO captions as COCO, Karpathy and the authors of BLIP publish them, and Flickr30k in Karpathy's layout."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmm.data.base import DataError, fingerprint, image_folder, read_text
from jaxmm.data.sources.files import Files

TRAIN = ("train", "restval")
"""Splits that `train` includes, as in BLIP: 113,287 images of COCO. Karpathy's own `train` is `train-only`."""

LAYOUTS = """none of the known layouts:
  COCO's: `images` with `id`, `file_name`; `annotations` with `image_id`, `caption`
  Karpathy's: `images` with `filename`, `split`, `sentences` with `raw`
  BLIP's: a list of objects with `image`, `caption`"""


@dataclass(frozen=True)
class _Image:
    file: str
    captions: tuple[str, ...]
    image_id: str | None


def open_coco(spec: str, location: str, data_dir: str | None = None) -> Files:
    """Open one record per image, with all its captions, in the order of the file; Karpathy's layout: `FILE.json:SPLIT`.

    Split `train` includes `restval`, `train-only` does not; `a+b` is both. Raises `DataError`.
    """
    location, split = _cut(location)
    text = read_text(spec, location)
    where = f"source {spec!r}: {location}"
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"source {spec!r}: {location}:{error.lineno} is not JSON: {error}") from None
    images = _images(content, split, where)
    files = [image.file for image in images]
    root = image_folder(Path(location), files[0]) if files else Path(location).parent
    if root is None:
        raise DataError(f"source {spec!r}: {files[0]!r}, the first image, is neither beside {location} nor in a "
                        f"folder beside it or beside its folder")
    return Files(name=spec, root=str(root), files=files, captions=[image.captions for image in images],
                 image_ids=[image.image_id for image in images], fingerprint=fingerprint([split, text]))


def _cut(location: str) -> tuple[str, str | None]:
    """Return the file and the split of `FILE.json:SPLIT`. The name of an existing file may contain a colon."""
    file, colon, split = location.rpartition(":")
    return (file, split) if colon and file.endswith(".json") and not Path(location).is_file() else (location, None)


def _images(content: Any, split: str | None, where: str) -> list[_Image]:
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(content, list):
        layout, read = "BLIP's", _blip
    elif isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        layout, read = "Karpathy's", _karpathy
    elif images is not None:
        layout, read = "COCO's", _coco
    else:
        raise DataError(f"{where} is {LAYOUTS}")
    if read is not _karpathy and split is not None:
        raise DataError(f"{where} has {layout} layout, without splits; given {split!r}")
    try:
        return _karpathy(content, split, where) if read is _karpathy else read(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is not {layout} captions layout: {type(error).__name__} {error}; it is "
                        f"{LAYOUTS}") from None


def _coco(content: dict) -> list[_Image]:
    captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
    return [_Image(image["file_name"], tuple(captions[image["id"]]), str(image["id"]))
            for image in content["images"]]


def _karpathy(content: dict, split: str | None, where: str) -> list[_Image]:
    images = content["images"]
    splits = list(dict.fromkeys(image["split"] for image in images))
    if split is None and len(splits) > 1:
        raise DataError(f"{where} has the splits {', '.join(splits)}; expected one of them behind the file, "
                        f"as in FILE.json:{splits[0]}")
    chosen = splits if split is None else _chosen(split, splits, where)
    return [_Image(str(Path(image.get("filepath", ""), image["filename"])),
                     tuple(str(sentence["raw"]) for sentence in image["sentences"]),
                     str(image["cocoid"] if "cocoid" in image else image["imgid"]))
            for image in images if image["split"] in chosen]


def _chosen(split: str, splits: Sequence[str], where: str) -> set[str]:
    chosen: set[str] = set()
    for part in split.split("+"):
        known = [name for name in {"train": TRAIN, "train-only": ("train",)}.get(part, (part,)) if name in splits]
        if not known:
            raise DataError(f"{where} has no split {part!r}; expected one of {', '.join(splits)}")
        chosen.update(known)
    return chosen


def _blip(content: list) -> list[_Image]:
    """Read entries of one caption each (train), several per image, or of all captions of an image (val, test)."""
    captions: dict[str, list[str]] = {}
    ids: dict[str, str | None] = {}
    for entry in content:
        texts = entry["caption"]
        captions.setdefault(entry["image"], []).extend([texts] if isinstance(texts, str) else map(str, texts))
        ids.setdefault(entry["image"], str(entry["image_id"]) if "image_id" in entry else None)
    return [_Image(file, tuple(texts), ids[file]) for file, texts in captions.items()]

