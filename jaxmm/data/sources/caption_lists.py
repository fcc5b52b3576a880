"""Read images with captions in a list (JSON lines, JSON, CSV, TSV), in the Hub's folders, or in text files beside."""

import os
from pathlib import Path

from jaxmm.data.base import EXTENSIONS, DataError, find_images, fingerprint
from jaxmm.data.cleaning import texts_with_origins, usable_texts
from jaxmm.data.sources.annotations import Row, read_rows, read_text
from jaxmm.data.sources.columns import read_location
from jaxmm.data.sources.files import Files
from jaxmm.data.sources.image_roots import find_root
from jaxmm.paths import exists, is_bucket, user_path

LISTS = tuple(f"{name}{suffix}" for name in ("metadata", "captions") for suffix in (".jsonl", ".csv", ".tsv", ".json"))
"""Names of a list in a folder of images, as the Hub and others write them."""
TEXT_SUFFIXES = (".txt", ".caption", ".cap")
"""Extensions of text files with the captions of one image, one per line."""


def open_captions(spec: str, location: str, data_dir: str | None = None) -> Files:
    """Open a list in a file or a folder, with one image per row, or a folder of images with text files beside them.

    A row has a path relative to the file, and captions; see `columns` for names and options. A row that cannot be read
    is one bad record. Raises `DataError`.
    """
    place = read_location(spec, location, ("image", "caption", "origin", "image_id"), exists=exists)
    path = user_path(place.path)
    if path.is_dir():
        lists = [name for name in LISTS if (path / name).is_file()]
        if len(lists) > 1:
            raise DataError(f"source {spec!r}: {path} has {', '.join(lists)}; expected one of them, as in "
                            f"captions:{path / lists[0]}")
        if not lists:
            inner = sorted({str(file.parent) for name in LISTS for file in path.glob(f"*/{name}")})
            if inner:
                raise DataError(f"source {spec!r}: lists are in {', '.join(inner)}; expected one of them")
            if is_bucket(path):
                raise DataError(f"source {spec!r}: {path} has none of {', '.join(LISTS)}; expected one, because to "
                                "open many text files in a bucket is slow")
            return _open_beside(spec, path)
        path = path / lists[0]
    read = read_rows(spec, path, place.columns)
    rows, content = read.rows, read.content
    if content and all(name.lower().endswith(EXTENSIONS) for name in content):  # captions by image
        rows = [Row(f", entry {name!r}", {"image": name, "caption": value}) for name, value in content.items()]
    elif content is not None and place.columns.get(content, "image") is None:
        raise DataError(f"source {spec!r}: {path} is one object with {', '.join(map(repr, content))[:200]}; "
                        "expected one object per line, or a list. Is it coco:FILE.json or vqa:FILE.json?")
    elif content is not None:
        rows = [Row(":1", content)]
    files, captions, origins, image_ids, faults, without = [], [], [], [], {}, 0
    for number, row in enumerate(rows):
        image = None if row.value is None else place.columns.get(row.value, "image")
        if isinstance(image, dict):
            image = image.get("path")
        fault = row.fault if row.value is None else None if isinstance(image, (str, int)) else (
            f"names no image; its keys are {', '.join(map(str, row.value))[:200]}")
        texts, own = (), ()
        if fault is None:
            try:
                read_texts = texts_with_origins(*(place.columns.get(row.value, name) for name in ("caption", "origin")))
                texts, own = read_texts["texts"], read_texts.get("origins", ())
            except ValueError as error:
                fault = f"cannot be used: {error}"
        if fault is not None:
            faults[number] = fault
        files.append(f"{path.name}{row.place}" if fault else str(image).strip())
        captions.append(texts)
        origins.append(own)
        without += not texts and not fault
        image_id = None if fault else place.columns.get(row.value, "image_id")
        image_ids.append(None if image_id is None else str(image_id))
    if files and len(faults) == len(files):
        raise DataError(f"source {spec!r}: {path}{rows[0].place} {faults[0]}; expected an object with `image`, a path, "
                        "and `caption`, a text, or `captions`, a list of texts")
    if files and without + len(faults) == len(files):
        keys = next(row.value for row in rows if row.value is not None)
        raise DataError(f"source {spec!r}: {path} has no captions: the keys of its rows are {', '.join(keys)[:200]}. "
                        f"Name one, as in {spec}@caption=NAME")
    root = find_root(spec, path, [["" if number in faults else file for number, file in enumerate(files)]],
                     root=place.root, relative=True)
    notes = [*read.notes, *root.notes]
    notes += [f"{len(faults)} of {len(rows)} rows cannot be read"] if faults else []
    lines = read.text.split("\n")
    return Files(name=spec, root=root.path, files=files, captions=captions, image_ids=image_ids, faults=faults,
                 origins=origins if any(origins) else None, notes=tuple(notes),
                 fingerprint=fingerprint([*lines, str(place.columns)] if place.columns.chosen else lines))


def _open_beside(spec: str, folder: Path) -> Files:
    """Open the images in `folder` and its subfolders; the captions of each are the lines of a text file beside it."""
    files = [os.path.relpath(path, folder) for path in find_images(folder)]
    captions, notes = [], []
    for file in files:
        names = [f"{stem}{suffix}" for stem in (os.path.splitext(file)[0], file) for suffix in TEXT_SUFFIXES]
        beside = next((path for path in map(folder.joinpath, names) if path.is_file()), None)
        text, remarks = ("", ()) if beside is None else read_text(spec, beside)
        captions.append(usable_texts(text.split("\n")))
        notes += remarks
    without = sum(not texts for texts in captions)
    if without == len(files):
        raise DataError(f"source {spec!r}: in {folder} is none of {', '.join(LISTS)}, and no text file with a caption "
                        f"beside one of {len(files)} images ({' '.join(TEXT_SUFFIXES)})")
    notes += [f"{without} of {len(files)} images have no text file with a caption beside them"] if without else []
    parts = [part for file, texts in zip(files, captions, strict=True) for part in (file, *texts, "")]
    return Files(name=spec, root=str(folder), files=files, captions=captions, notes=tuple(notes),
                 fingerprint=fingerprint(parts))
