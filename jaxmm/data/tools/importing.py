"""Convert any source of single images to a TFDS data set, in worker processes; an interrupted import continues.

The bytes of the result depend on the source and the settings, not on workers or interruptions.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from jaxmm.atomic import write_atomically
from jaxmm.data.base import DataError, Source
from jaxmm.data.processes import in_order
from jaxmm.data.sources.shards import shards
from jaxmm.data.tools.checking import Tally, pixel_id, usable_records
from jaxmm.data.tools.writing import (
    ORIGINS,
    WORK,
    Features,
    Written,
    finish,
    image_features,
    is_complete,
    remove_work,
    shard_path,
    write_shard,
)
from jaxmm.folder_locks import FolderInUse, lock_folder
from jaxmm.paths import user_path

NOTES = "import.json"
"""The file in the data set with the settings, the fingerprint of every shard, and the report."""
FORMAT = 1
"""A number that changes when the same source gives other bytes."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of an import."""

    tally: Tally
    shards: int
    faults: list[dict[str, str]]
    complete_before: bool
    """True if the finished data set existed already and nothing was done."""


def import_source(
    source: Source, dest: Path | str, *, split: str = "train", workers: int = 1, shard_records: int = 1000,
    on_shard: Callable[[int], None] = lambda records: None,
) -> Imported:
    """Write `source` as the TFDS data set `dest`, a new folder, with one shard for each of the source's.

    Images that every reader sees upright in 8-bit RGB keep their bytes, others become PNG; bad records are left out.
    `on_shard` gets the number of records of each shard. Raises `DataError` if the folder is something else.
    """
    dest = user_path(dest, "dest").absolute()
    _check(source, split)
    parts = shards(source, shard_records)
    settings = {"format": FORMAT, "split": split, "shard_records": shard_records,
                "classes": None if source.classes is None else list(source.classes)}
    if is_complete(dest):
        return _finished(dest, settings, [part.fingerprint for part in parts])
    folder = dest.with_name(dest.name + ".part")
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locked:
        try:
            locked.enter_context(lock_folder(folder / WORK))
        except FolderInUse:
            raise DataError(f"another process imports into {dest}") from None
        results = []
        for result in in_order(partial(_import_shard, folder, settings, parts), range(len(parts)), workers):
            results.append(result)
            on_shard(result["tally"]["records"])
        tally = sum((Tally.from_dict(result["tally"]) for result in results), Tally())
        if not tally.usable:
            raise DataError(f"source {source.name!r}: none of its {tally.records} records can be used"
                            f"{_reasons(tally)}")
        written = [Written(shard_path(folder, split, number), result["tally"]["usable"], result["bytes"])
                   for number, result in enumerate(results)]
        faults = [{"shard": result["shard"], "fault": result["fault"]} for result in results if result["fault"]]
        write_atomically(folder / NOTES, json.dumps(
            {"settings": settings, "inputs": [result["input"] for result in results], "tally": tally.to_dict(),
             "shards": sum(shard.records > 0 for shard in written), "faults": faults}, indent=1))
        finish(folder, dest, _features(source), {split: written})
    return _read(dest, complete_before=False)


def _check(source: Source, split: str) -> None:
    if source.images_per_record > 1 or source.most_answers or source.tags is not None:
        raise DataError(f"source {source.name!r} has questions, several labels or several images per record; expected "
                        "images with captions, or with one label each")
    if not re.fullmatch(r"[a-zA-Z]\w*", split, re.ASCII) or split == "all":
        raise DataError(f"split is {split!r}; expected a word such as train ('all' is every split together)")


def _finished(dest: Path, settings: dict[str, Any], inputs: list[str]) -> Imported:
    """Return the report of the same import, which is complete already."""
    try:
        notes = json.loads((dest / NOTES).read_text())
        same = notes["settings"] == settings and notes["inputs"] == inputs
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(f"{dest} exists and is not what this import would write; expected a new folder")
    remove_work(dest)
    return _read(dest, complete_before=True)


def _read(dest: Path, complete_before: bool) -> Imported:
    notes = json.loads((dest / NOTES).read_text())
    return Imported(tally=Tally.from_dict(notes["tally"]), shards=notes["shards"], faults=notes["faults"],
                    complete_before=complete_before)


def _import_shard(folder: Path, settings: dict[str, Any], parts: list[Source], number: int) -> dict[str, Any]:
    """Write a shard and a note beside it, unless both exist and are of the same input."""
    shard = parts[number]
    path = shard_path(folder, settings["split"], number)
    note = path.with_suffix(".json")
    wanted = {"settings": settings, "input": shard.fingerprint}
    try:
        result = json.loads(note.read_text())
        if wanted.items() <= result.items() and result["size"] == (path.stat().st_size if result["size"] else 0):
            return result
    except (OSError, ValueError, KeyError):
        pass
    note.unlink(missing_ok=True)
    tally = Tally()
    written = write_shard(_examples(shard, tally), path, _features(shard))
    result = wanted | {"shard": shard.name, "tally": tally.to_dict(), "bytes": written.bytes,
                       "size": path.stat().st_size if written.records else 0, "fault": shard.fault}
    write_atomically(note, json.dumps(result))
    return result


def _examples(shard: Source, tally: Tally) -> Iterator[dict[str, Any]]:
    for key, usable in usable_records(shard, tally):
        (image,), (plain,) = usable.images, usable.plain
        example = {"key": key, "image": usable.record["image"] if plain else png(image),
                   "image_id": pixel_id(image), "texts": list(usable.texts)}
        if shard.has_origins:
            example["origins"] = list(usable.record.get("origins", ()))
        yield example | ({} if usable.label is None else {"label": usable.label})


def _features(source: Source) -> Features:
    return image_features(source.classes, **(ORIGINS if source.has_origins else {}))


def png(image: Image.Image) -> bytes:
    """Return an RGB image as PNG, without the metadata of its old file."""
    stream = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(stream, "png")
    return stream.getvalue()


def _reasons(tally: Tally) -> str:
    named = [f"{count} {reason}" for reason, count in tally.broken.most_common()]
    return f" ({', '.join(named)})" if named else ""


def summary(imported: Imported) -> str:
    """Return text for people: how many images, and how many were left out, why, and which."""
    tally = imported.tally
    lines = [f"{tally.usable:,} images in {imported.shards:,} shards"]
    if tally.broken:
        lines.append(f"left out: {tally.broken.total():,} of {tally.records:,} records{_reasons(tally)}")
        lines += [f"  {reason}: {', '.join(keys)}" for reason, keys in tally.examples.items()]
    return "\n".join([*lines, *(f"{fault['shard']}: {fault['fault']}" for fault in imported.faults)])
