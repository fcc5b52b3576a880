"""Define what a data source is: records by number, with keys, texts and errors."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from jaxmm.data.cleaning import printable, usable_texts
from jaxmm.paths import is_bucket, user_path

Record = dict[str, Any]
"""Some of `key` (str), `image` (encoded bytes, or uint8 [h, w, 3]; or a tuple of two such), `image_id` (str; without
one, images of the same bytes count as the same), `texts` (tuple of str: all captions of the image), `origins` (tuple of
str: where each of `texts` comes from, such as web, synthetic or human), `label` (int), `tags` (tuple of int: all labels
of an image that may have several), `question` (str) with `answers` (tuple of str, repeats counted) and `question_id`
(str or int)."""

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information",
                            "lost+found"})
"""Names of folders that a system makes among a user's, besides hidden ones. They are passed over."""


class DataError(ValueError):
    """Data that cannot be used: the message says what was given, what was expected and where."""


class Source:
    """Records by number.

    To define one, subclass this, set `name` and `fingerprint`, and write `__len__` and `__getitem__`. The other members
    have defaults. A source must pickle, because worker processes read it too.
    """

    name: str
    """The spec that opens this source; messages use it."""
    fingerprint: str
    """A digest that changes with the list of records. A run does not resume with another one."""
    classes: tuple[str, ...] | None = None
    """Names of the labels; None: records have no label."""
    tags: tuple[str, ...] | None = None
    """Names of classes of which an image may have several or none; None: records have no tags."""
    templates: tuple[str, ...] | None = None
    """Prompts of zero-shot classification, with `{}` in the place of a class name, that belong to this data and its
    names; None: it has none."""
    images_per_record: int = 1
    has_origins: bool = False
    """True if records say where each of their texts comes from."""
    has_foils: bool = False
    """True if the texts of a record are one that is true of each of its images, and then others that are not."""
    most_answers: int = 0
    """The largest number of different answers to one question; 0: records have no questions with answers."""
    grades_captions: bool = False
    """True if `is_true` and `names_largest` can grade a caption."""
    grades_images: bool = False
    """True if `shows_largest` can grade an image."""
    fault: str | None = None
    """The reason why the file of this source is damaged or cannot be read."""
    notes: tuple[str, ...] = ()
    """Remarks on what was left out, counted. `open_source` logs them."""

    def __len__(self) -> int:
        """Return the number of records, at least one."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """Read one record. Any exception but `MemoryError` counts as a record that cannot be used."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Return the name of a record, also of one that cannot be read."""
        try:
            return self[index]["key"]
        except Exception:  # reading may fail in any way
            return f"{self.name}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return all captions of a record, or its question and answers; override it to avoid reading the image."""
        return self[index].get("texts", ())

    def tags_of(self, index: int) -> tuple[int, ...]:
        """Return the numbers of a record's tags; override it to avoid reading the image."""
        return self[index]["tags"]

    def answers(self, index: int) -> tuple[str, ...]:
        """Return all answers to the question of a record, repeats counted."""
        return self[index].get("answers", ())

    def others(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[str, ...]]]:
        """Return `count` more questions about the image of a record, with all answers to each.

        By default they are the record's own question, repeated.
        """
        record = self[index]
        return [(record["question"], record["answers"])] * count

    def vary(self, record: Record, rng: np.random.Generator) -> Record:
        """Return `record` changed at random, as training sees it."""
        return record

    @property
    def varies(self) -> bool:
        """True if `vary` changes records."""
        return type(self).vary is not Source.vary

    @property
    def image_id_scope(self) -> str | None:
        """The name under which an `image_id` means one image; None if it is a digest of the image's content.

        Images of two sources with the same `image_id` are the same image only if the scopes are equal.
        """
        return self.name

    def shards(self) -> tuple["Source", ...]:
        """Return the sources that this one consists of; () if it is not divided.

        Each reads its index at first use.
        """
        return ()

    def is_true(self, index: int, caption: str) -> bool:
        """Return whether `caption` is true of the image of a record."""
        raise NotImplementedError

    def names_largest(self, index: int, caption: str) -> bool:
        """Return whether `caption` names the largest object of the image of a record."""
        raise NotImplementedError

    def shows_largest(
        self, index: int, images: UInt8[np.ndarray, "n s s 3"], part: Bool[np.ndarray, "s s"]
    ) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]] | None:
        """Return whether `images` show the largest object of a record's image in its colour, and in its shape, judged
        by the pixels in `part`. None: not enough of it is in `part`, or outside of it.
        """
        raise NotImplementedError


def record_texts(source: Source, index: int) -> tuple[str, ...]:
    """Return all captions of a record that are not blank, cleaned."""
    return usable_texts(source.texts(index))


def record_key(source: Source, index: int) -> str:
    """Return the name of a record, as it can be printed and written, even if its key cannot be read."""
    try:
        return printable(source.key(index))
    except Exception:  # a damaged file makes readers raise nearly anything
        return printable(f"{source.name}#{index}")


def digest(parts: Iterable[bytes], size: int = 16) -> str:
    """Return the BLAKE2b digest of `parts`, one after the other, as 2 x `size` hex digits."""
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def fingerprint(parts: Iterable[object]) -> str:
    """Return a short digest of what a source lists, to notice at resume that it changed."""
    return digest((str(part).encode(errors="surrogatepass") + b"\0" for part in parts), size=8)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or the system's own."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def find_images(folder: str | Path, passed: Counter[str] | None = None) -> list[str]:
    """Return the sorted paths of all image files in `folder` and its subfolders, chosen by file extension.

    Links to folders are followed. Hidden and system folders are passed over, as are files of other types, which are
    counted by extension in `passed`.
    """
    images, visited, passed = [], set(), Counter() if passed is None else passed
    if is_bucket(folder):
        for path in user_path(folder).files():
            *folders, name = path.relative_to(folder).parts
            if any(map(is_hidden, (*folders, name))):
                passed["hidden files"] += 1
            elif name.lower().endswith(EXTENSIONS):
                images.append(str(path))
            else:
                passed[f"{path.suffix.lower() or name} files"] += 1
        return sorted(images)
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # by a link that leads upwards
            folders.clear()
            continue
        visited.add(real)
        passed["hidden folders"] += sum(map(is_hidden, folders))
        folders[:] = (name for name in folders if not is_hidden(name))
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not is_hidden(name):
                images.append(os.path.join(parent, name))
            else:
                passed["hidden files" if is_hidden(name) else f"{os.path.splitext(name)[1].lower() or name} files"] += 1
    return sorted(images)
