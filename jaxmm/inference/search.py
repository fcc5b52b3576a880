"""Search images by text or by an image: an index on disk with exact search.

An index is a folder: `index.json` (the model, the row length), `embeddings.f32` (rows of length 1) and `pictures.jsonl`
(one line per image: its path, or why it is not in the index). It may be larger than memory, when it is built and when
it is searched.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmm.atomic import write_atomically
from jaxmm.data.base import fingerprint
from jaxmm.folder_locks import FolderInUse, lock_folder
from jaxmm.paths import is_bucket, is_taken, local_copy, move_folder, staging_folder, user_path

CHUNK = 2048
"""Number of images after which an interrupted index can continue."""
ROWS = 2**16
"""Number of embeddings that are compared at a time."""
SETTINGS, VECTORS, PICTURES = "index.json", "embeddings.f32", "pictures.jsonl"

Encode = Callable[[Iterable[str], Callable[[str, Exception], None]], Float[np.ndarray, "n e"]]
"""Embeddings of images; unreadable ones are passed to the second argument and left out."""


class SearchError(RuntimeError):
    """An index that cannot be built or read."""


@dataclass(frozen=True)
class Found:
    """An image and its cosine with the query."""

    path: str
    score: float


@dataclass(frozen=True)
class Index:
    """A complete index."""

    model: str
    """Source of the model, for `jaxmm.load`."""
    embeddings: Float[np.ndarray, "n e"]
    """Embeddings, memory-mapped."""
    paths: list[str]
    loading: Mapping[str, str] = field(default_factory=dict)
    """Options of `jaxmm.load` that the model was loaded with."""

    def search(self, query: Float[np.ndarray, " e"], top: int = 10) -> list[Found]:
        """Return the `top` images nearest to `query`, a vector of length 1, best first."""
        return [Found(self.paths[number], score) for number, score in self.nearest(query, top)]

    def nearest(self, query: Float[np.ndarray, " e"], top: int) -> list[tuple[int, float]]:
        """Return what `search` returns, as pairs of an image's position in `paths` and its cosine."""
        best = np.empty(0, np.float32)
        where = np.empty(0, np.int64)
        for start in range(0, len(self.paths), ROWS):
            scores = self.embeddings[start:start + ROWS] @ query.astype(np.float32)
            best, where = np.append(best, scores), np.append(where, np.arange(start, start + len(scores)))
            order = np.argsort(-best, kind="stable")[:top]
            best, where = best[order], where[order]
        return list(zip(where.tolist(), best.tolist(), strict=True))


def build_index(
    encode: Encode, model: str, paths: Sequence[str], folder: Path | str, *,
    on_error: Callable[[str, Exception], None], on_chunk: Callable[[int], None] = lambda count: None,
    loading: Mapping[str, str] | None = None,
) -> int:
    """Encode `paths` into a new index `folder`; return the number of images in it.

    If the same call was interrupted, it continues. `on_error` is called with each unreadable image, which is left out,
    and `on_chunk` with the number of images just encoded. `loading` are the options of `jaxmm.load` that `model` was
    loaded with. Raises `SearchError` if the folder exists.
    """
    folder = user_path(folder, "folder")
    if not paths:
        raise SearchError("there are no images to put into an index")
    part = staging_folder(folder)
    settings = {"model": model, "loading": dict(loading or {}), "pictures": fingerprint(paths)}
    try:
        with lock_folder(part.parent) if is_bucket(folder) else contextlib.nullcontext():
            if is_taken(folder):
                raise SearchError(f"{folder} exists; expected a new folder for the index")
            part.mkdir(parents=True, exist_ok=True)
            kept = _encode_all(encode, settings, paths, part, on_error, on_chunk)
            move_folder(part, folder, last=SETTINGS)
            return kept
    except FolderInUse:
        raise SearchError(f"another process is building {folder}; expected to be the only one") from None


def _encode_all(encode: Encode, expected: dict[str, Any], paths: Sequence[str], part: Path,
                on_error: Callable[[str, Exception], None], on_chunk: Callable[[int], None]) -> int:
    """Write the index with the settings `expected` into `part`, from where it was left; return the number of images."""
    done, kept, size = _resume(part, expected)
    on_chunk(done)
    with (part / VECTORS).open("ab") as vectors, (part / PICTURES).open("a", encoding="utf-8") as lines:
        for start in range(done, len(paths), CHUNK):
            chunk, bad = paths[start:start + CHUNK], {}

            def refuse(path, error, bad=bad):
                bad[path] = error
                on_error(path, error)

            rows = encode(chunk, refuse)
            if size is None and len(rows):
                size = rows.shape[1]
                write_atomically(part / SETTINGS, json.dumps(expected | {"size": size}))
            vectors.write(np.ascontiguousarray(rows, np.float32).tobytes())
            _flush(vectors)  # before the lines: these say what is done
            lines.writelines(json.dumps({"path": path if is_bucket(path) else os.path.abspath(path)} | (
                {"error": str(bad[path])} if path in bad else {})) + "\n" for path in chunk)
            _flush(lines)
            kept += len(rows)
            on_chunk(len(chunk))
    if not kept:
        raise SearchError(f"none of the {len(paths)} images can be read")
    return kept


def _resume(part: Path, wanted: dict[str, Any]) -> tuple[int, int, int | None]:
    """Return the numbers of images that an interrupted index has tried and kept, and its row length; or clear it."""
    try:
        settings = json.loads((part / SETTINGS).read_text())
        text = (part / PICTURES).read_text(encoding="utf-8")
        lines = text[:text.rfind("\n") + 1].splitlines()
        lines = lines[:len(lines) // CHUNK * CHUNK]
        kept = sum("error" not in json.loads(line) for line in lines)
        same = {name: settings[name] for name in wanted} == wanted
        size = settings["size"]
    except (OSError, ValueError, KeyError):
        same = False
    if not same or (part / VECTORS).stat().st_size < kept * size * 4:
        for name in (SETTINGS, PICTURES, VECTORS):
            (part / name).unlink(missing_ok=True)
        return 0, 0, None
    os.truncate(part / VECTORS, kept * size * 4)
    write_atomically(part / PICTURES, "".join(f"{line}\n" for line in lines))
    return len(lines), kept, size


def open_index(folder: Path | str) -> Index:
    """Open an index. Raises `SearchError` if it is not an index or is damaged."""
    folder = user_path(folder, "folder")
    try:
        folder = local_copy(folder)
        settings = json.loads((folder / SETTINGS).read_text())
        with (folder / PICTURES).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        paths = [row["path"] for row in rows if "error" not in row]
        embeddings = np.memmap(folder / VECTORS, np.float32, "r").reshape(len(paths), settings["size"])
        return Index(settings["model"], embeddings, paths, settings.get("loading", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchError(f"{folder} is no index that `jaxmm search index` made: {error}") from None


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
