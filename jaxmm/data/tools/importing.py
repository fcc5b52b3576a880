"""Any source of single pictures to a TFDS data set, by worker processes; interrupted, it goes on.

The bytes of the result depend on the source and the settings, not on workers or interruptions.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import filelock
from PIL import Image

from jaxmm.atomic import write_atomically
from jaxmm.data.base import DataError, Source
from jaxmm.data.processes import in_order
from jaxmm.data.sources.shards import shard_fault, shards
from jaxmm.data.tools.checking import Tally, pixel_id, usable_records
from jaxmm.data.tools.writing import (
    WORK,
    Written,
    finish,
    picture_features,
    remove_work,
    shard_path,
    take_back,
    write_shard,
)

NOTES = "import.json"
"""In the data set: the settings, the fingerprint of every shard, and the report."""
FORMAT = 1
"""Counted up when the same source gives other bytes."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of a source."""

    tally: Tally
    shards: int
    faults: list[dict[str, str]]
    anew: bool
    """Whether anything was done; False where the finished result was there."""


def import_source(
    source: Source, dest: Path, *, split: str = "train", workers: int = 1, shard_records: int = 1000,
    on_shard: Callable[[int], None] = lambda records: None,
) -> Imported:
    """Writes `source` as the TFDS data set `dest`, a new folder, a shard for each of the source's.

    Pictures that any reader sees upright in 8-bit RGB keep their bytes, others become PNG; bad records are left out.
    `on_shard` is told how many records each shard had. Raises `DataError` for a folder that is something else.
    """
    dest = dest.absolute()
    _check(source, split)
    parts = shards(source, shard_records)
    settings = {"format": FORMAT, "split": split, "shard_records": shard_records,
                "classes": None if source.classes is None else list(source.classes)}
    if dest.exists():
        return _finished(dest, settings, [part.fingerprint for part in parts])
    folder = dest.with_name(dest.name + ".part")
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(folder / WORK / "lock").acquire(blocking=False)
    except filelock.Timeout:
        raise DataError(f"another process imports into {dest}") from None
    with lock:
        take_back(folder)
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
        finish(folder, dest, picture_features(source.classes), {split: written})
    return _read(dest, anew=True)


def _check(source: Source, split: str) -> None:
    if getattr(source, "pictures", 1) > 1 or hasattr(source, "most_answers"):
        raise DataError(f"source {source.name!r} has questions or several pictures a record; wanted pictures with "
                        "captions or labels")
    if not re.fullmatch(r"[a-zA-Z]\w*", split, re.ASCII) or split == "all":
        raise DataError(f"split is {split!r}; wanted a word such as train ('all' is every split together)")


def _finished(dest: Path, settings: dict[str, Any], inputs: list[str]) -> Imported:
    """The report of the same import, which is there already."""
    try:
        notes = json.loads((dest / NOTES).read_text())
        same = notes["settings"] == settings and notes["inputs"] == inputs
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(f"{dest} exists and is not what this import would write; wanted a new folder")
    remove_work(dest)
    return _read(dest, anew=False)


def _read(dest: Path, anew: bool) -> Imported:
    notes = json.loads((dest / NOTES).read_text())
    return Imported(tally=Tally.from_dict(notes["tally"]), shards=notes["shards"], faults=notes["faults"], anew=anew)


def _import_shard(folder: Path, settings: dict[str, Any], parts: list[Source], number: int) -> dict[str, Any]:
    """Writes a shard and a note of it beside it, unless both are there and of the same input."""
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
    written = write_shard(_examples(shard, tally), path, picture_features(shard.classes))
    result = wanted | {"shard": shard.name, "tally": tally.to_dict(), "bytes": written.bytes,
                       "size": path.stat().st_size if written.records else 0, "fault": shard_fault(shard)}
    write_atomically(note, json.dumps(result))
    return result


def _examples(shard: Source, tally: Tally) -> Iterator[dict[str, Any]]:
    for usable in usable_records(shard, tally):
        example = {"key": usable.key, "image": usable.encoded or png(usable.image),
                   "image_id": pixel_id(usable.image), "texts": list(usable.texts)}
        yield example | ({} if usable.label is None else {"label": usable.label})


def png(image: Image.Image) -> bytes:
    """An RGB picture as PNG, without what its old file said besides."""
    stream = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(stream, "png")
    return stream.getvalue()


def _reasons(tally: Tally) -> str:
    named = [f"{count} {reason}" for reason, count in tally.broken.most_common()]
    return f" ({', '.join(named)})" if named else ""


def summary(imported: Imported) -> str:
    """For people: how many, how many not and why, and the first of those."""
    tally = imported.tally
    lines = [f"{tally.usable:,} pictures in {imported.shards:,} shards"]
    if tally.broken:
        lines.append(f"left out: {tally.broken.total():,} of {tally.records:,} records{_reasons(tally)}")
        lines += [f"  {reason}: {', '.join(keys)}" for reason, keys in tally.examples.items()]
    return "\n".join([*lines, *(f"{fault['shard']}: {fault['fault']}" for fault in imported.faults)])
