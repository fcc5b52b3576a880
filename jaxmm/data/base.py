"""Define what a data source is: records by number, their keys, texts and errors."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Record = dict[str, Any]
"""Some of `key` (str), `image` (encoded bytes, or uint8 [h, w, 3]; or a tuple of two such), `image_id` (str; without
one, pictures of the same bytes count as the same), `texts` (tuple of str: all captions of the picture), `label` (int),
`question` (str) with `answers` (tuple of str, repeats counted)."""


EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class DataError(ValueError):
    """Data that cannot be used: the message says what was given, what was wanted and where."""


@runtime_checkable
class Source(Protocol):
    """Records by number. Must pickle, because worker processes read it too.

    May have `key(i)` and `texts(i)`, which answer without reading the picture; `pictures`, how many a record has (1);
    `vary(record, rng)`, a record as training sees it, changed by chance; and `shards()`, the sources that make it up,
    of which each reads its index when it is first needed, and may have `fault`, what is wrong with it as a whole.
    """

    name: str
    classes: tuple[str, ...] | None
    fingerprint: str

    def __len__(self) -> int:
        """How many records there are; at least one."""

    def __getitem__(self, index: int) -> Record:
        """Reads one record; any exception counts as a record that cannot be read."""


def record_key(source: Source, index: int) -> str:
    """The name of a record, also of one that cannot be read."""
    if hasattr(source, "key"):
        return source.key(index)
    try:
        return source[index]["key"]
    except Exception:
        return f"{source.name}#{index}"


def record_texts(source: Source, index: int) -> tuple[str, ...]:
    """All captions of a record that are not blank, without reading its picture where the source can."""
    texts = source.texts(index) if hasattr(source, "texts") else source[index].get("texts", ())
    return tuple(text for text in texts if text.strip())


def fingerprint(parts: Iterable[object]) -> str:
    """A short digest of what a source lists, to notice at resume that it changed."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(str(part).encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def find_pictures(folder: str | Path) -> list[str]:
    """The sorted paths of all pictures in `folder` and the folders in it, by their names' ends."""
    return sorted(os.path.join(where, file) for where, _, names in os.walk(folder) for file in names
                  if file.lower().endswith(EXTENSIONS) and not file.startswith("."))


def read_text(spec: str, location: str) -> str:
    """The text of a file of the source `spec`. Raises `DataError`."""
    try:
        return Path(location).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"source {spec!r}: cannot read {location}: {error.strerror}") from None


def image_folder(file: Path, picture: str) -> Path | None:
    """The folder of COCO's pictures: beside the annotations, or beside the folder that they are in."""
    folder = file.resolve().parent
    for candidate in (folder, folder / "images", *_folders(folder), folder.parent, *_folders(folder.parent)):
        if (candidate / picture).is_file():
            return candidate
    return None


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())
