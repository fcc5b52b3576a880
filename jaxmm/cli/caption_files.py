"""Files of captions: one text file beside each image, or one file of all."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxmm.atomic import write_atomically
from jaxmm.inference.result_files import number_of
from jaxmm.paths import is_bucket, user_path
from jaxmm.validation import ConfigError

CaptionFormat = Literal["txt", "csv", "jsonl", "coco"]
Captions = Sequence[tuple[str, float]]


def caption_files(paths: Sequence[str], to: CaptionFormat, out: Path | None, overwrite: bool) -> dict[str, Path]:
    """Return the file for the captions of each image. Raise `ConfigError` if one exists, or if two images share one.

    With `txt` they are IMAGE.txt, in the folder `out` if it is given; else all are `out`, by default captions.csv,
    captions.jsonl or captions.json in the current folder.
    """
    if to != "txt":
        name = "captions.json" if to == "coco" else f"captions.{to}"
        files = dict.fromkeys(paths, Path(name) if out is None else out)
    else:
        files = {path: (user_path(path) if out is None else out / Path(path).name).with_suffix(".txt")
                 for path in paths}
        owners: dict[Path, str] = {}
        for path, file in files.items():
            if (other := owners.setdefault(file, path)) != path:
                raise ConfigError(f"{path} and {other} would both be captioned in {file}; expected different names")
    existing = [] if overwrite else [file for file in dict.fromkeys(files.values()) if file.exists()]
    if existing:
        raise ConfigError(f"{existing[0]} exists{f', and {len(existing) - 1} more' if existing[1:] else ''}; expected "
                          "new files, or --overwrite")
    return files


def write_captions(rows: Sequence[tuple[str, Captions]], to: CaptionFormat, files: dict[str, Path]) -> list[Path]:
    """Write the captions of each image, best first, and return the files."""
    if to == "txt":
        for path, captions in rows:
            _write(files[path], "".join(f"{text}\n" for text, _ in captions))
    elif rows:
        file = files[rows[0][0]]
        _write(file, {"csv": _csv, "jsonl": _jsonl, "coco": _coco}[to](rows, file))
    return list(dict.fromkeys(files[path] for path, _ in rows))


def _csv(rows: Sequence[tuple[str, Captions]], file: Path) -> str:
    """Return a table with a header and one caption per line."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "caption", "score"))
    for path, captions in rows:
        writer.writerows((_relative(path, file), caption, f"{score:.6g}") for caption, score in captions)
    return text.getvalue()


def _jsonl(rows: Sequence[tuple[str, Captions]], file: Path) -> str:
    """Return one object per image, as the source `captions:` reads them."""
    return "".join(json.dumps({"image": _relative(path, file), "captions": [text for text, _ in captions],
                               "scores": [score for _, score in captions]}) + "\n" for path, captions in rows)


def _coco(rows: Sequence[tuple[str, Captions]], file: Path) -> str:
    """Return COCO's result format: the best caption of each image, by the number in the name of its file."""
    return json.dumps([{"image_id": number_of(Path(path).name), "caption": captions[0][0]}
                       for path, captions in rows], indent=0) + "\n"


def _relative(path: str, file: Path) -> str:
    """Return the path of an image as seen from the folder of `file`; a full path if only one of them is in a bucket."""
    if is_bucket(path) or is_bucket(file):
        parent = f"{user_path(file).parent}/"
        return path.removeprefix(parent) if is_bucket(path) else os.path.abspath(path)
    return Path(os.path.relpath(path, file.parent)).as_posix()


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode("utf-8", "replace").decode())
