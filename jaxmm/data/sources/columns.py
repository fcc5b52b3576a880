"""Find columns and keys by the names that data sets commonly have, and read the options behind a source's location.

`LOCATION@DIR` says in which folder the images are. `LOCATION@caption=NAME,image=NAME` names columns, keys or file
extensions. Both may follow one another. A real path may contain `@`: the longest part that exists is the location.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxmm.data.base import DataError
from jaxmm.data.cleaning import usable_texts
from jaxmm.paths import expand, is_address, is_bucket, user_path

NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "filename", "image_path", "img_path", "image_file", "image_name", "img", "path",
              "file_path", "filepath", "file", "image_filename", "img_name", "jpg", "jpeg", "png", "webp", "bytes",
              "image_bytes", "img_bytes", "image_data", "picture", "photo"),
    "caption": ("captions", "texts", "caption", "text", "txt", "sentences_raw", "sentences", "sentence", "raw",
                "alt_text", "alt", "description", "comment", "title", "prompt", "en", "caption_text"),
    "image_id": ("image_id", "imageId", "img_id", "image_ID"),
    "question": ("question", "query", "sent"),
    "answer": ("answers", "direct_answers", "answer", "multiple_choice_answer"),
    "origin": ("origins", "origin"),
    "label": ("label", "labels", "cls", "class", "category", "target", "fine_label"),
}
"""Names of every field, in order of preference. Upper and lower case are the same."""

_OPTION = re.compile(r"root=[^=]+|\w+=[^=/]+")


@dataclass(frozen=True)
class Columns:
    """The names of columns that the user chose, by field; others are found by `NAMES`."""

    chosen: Mapping[str, str] = field(default_factory=dict)

    def __str__(self):
        return ",".join(f"{name}={column}" for name, column in sorted(self.chosen.items()))

    def candidates(self, name: str, known: Collection[str], first: Sequence[str] = ()) -> list[str]:
        """Return those of the columns `known` that may be the field `name`, the best one first.

        The names `first` come before those of `NAMES`.
        """
        if name in self.chosen:
            return [self.chosen[name]] if self.chosen[name] in known else []
        return list(_candidates(name, tuple(known), tuple(first)))

    def get(self, row: Mapping[str, Any], name: str) -> Any:
        """Return the first value of `row` for the field `name` that is neither null nor blank, else None."""
        for column in self.candidates(name, row):
            value = row[column]
            if isinstance(value, str) and name != "caption":
                if value.strip():
                    return value
            elif usable_texts(value) or (name in ("image", "answer") and value not in (None, [])):
                return value
        return None


@lru_cache(maxsize=1024)
def _candidates(name: str, known: tuple[str, ...], first: tuple[str, ...]) -> tuple[str, ...]:
    plain = {}
    for column in known:
        plain.setdefault(column.strip().lower(), column)
    names = dict.fromkeys(map(str.lower, (*first, *NAMES.get(name, (name,)))))
    return tuple(plain[column] for column in names if column in plain)


@dataclass(frozen=True)
class Location:
    """A location without its options."""

    path: str
    root: Path | None = None
    """The folder of the images, if the user says so."""
    columns: Columns = field(default_factory=Columns)


def read_location(
    spec: str, location: str, fields: Iterable[str] = (), *, exists: Callable[[str], bool] | None = None
) -> Location:
    """Split `location` into its path and its options, which name `fields`. Raises `DataError` for another option.

    With `exists`, which says whether a path does, the root of the images is an option, too.
    """
    parts, root = location.split("@"), exists is not None
    count = next((i for i, part in enumerate(parts) if i and _is_option(part)), len(parts))
    if root:
        longest = next((i for i in range(len(parts), 0, -1) if exists("@".join(parts[:i]))), None)
        count = longest or min(count, max(1, len(parts) - 1))
    path, folder, chosen = "@".join(parts[:count]), [], {}
    allowed = {name: name for name in fields} | ({"root": "root"} if root else {})
    for part in parts[count:]:
        if not _is_option(part):
            folder.append(part)
            continue
        for option in part.split(","):
            name, _, value = option.partition("=")
            name = name if name in allowed else name.removesuffix("s")
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise DataError(f"source {spec!r}: it has no option {name!r}{hint} (expected "
                                f"{', '.join(f'{known}=...' for known in allowed) or 'none'})")
            chosen[name] = value
    given = chosen.pop("root", "@".join(folder) or None)
    if given is not None and not root:
        raise DataError(f"source {spec!r}: no {path!r} with {given!r} behind it; expected "
                        + (f"one of the options {', '.join(f'{known}=...' for known in allowed)}" if allowed else
                           "no option"))
    return Location(path, None if given is None else _folder(spec, given, user_path(path).parent), Columns(chosen))


def _is_option(part: str) -> bool:
    return all(_OPTION.fullmatch(option) for option in part.split(","))


def _folder(spec: str, root: str, beside: Path) -> Path:
    """Return the folder `root`, relative to here or to the folder `beside`."""
    if is_bucket(root):
        return user_path(root)
    if is_address(root):
        raise DataError(f"source {spec!r}: its images are in {root!r}; expected a folder, local or in a bucket")
    if is_bucket(beside):
        return beside / root
    folders = [folder for folder in (Path(expand(root)), beside / expand(root)) if folder.is_dir()]
    if not folders:
        raise DataError(f"source {spec!r}: no folder {root!r}")
    if not folders[0].samefile(folders[-1]):
        raise DataError(f"source {spec!r}: {root!r} is a folder here and beside the file; expected its full path")
    return folders[0]
