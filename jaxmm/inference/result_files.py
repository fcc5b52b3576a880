"""Write predictions in the formats that the evaluation servers of COCO captions and VQA read."""

import json
import re
from collections.abc import Iterable

import jax

from jaxmm.atomic import write_atomically
from jaxmm.data.base import EXTENSIONS, Record
from jaxmm.paths import user_path


def write_results(file: str, rows: Iterable[dict[str, int | str]]) -> None:
    """Write `rows` as one JSON list into `file`, from the first host only."""
    if jax.process_index() == 0:
        path = user_path(file, "results")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(list(rows), indent=0) + "\n")


def number_of(name: str) -> int | str:
    """Return the number that the name of an image file ends with, else the name as it is.

    `COCO_val2014_000000391895.jpg` becomes 391895, as in COCO's annotations.
    """
    stem, dot, _ = name.rpartition(".")
    match = re.search(r"\d+$", stem if dot else name, re.ASCII)
    return int(match[0]) if match else name


def result_id(record: Record, name: str) -> int | str:
    """Return the `image_id` or `question_id` of a record as a number if it is one; without one, that of its key."""
    value = record.get(name)
    if value is None:
        return number_of(str(record["key"]).partition("#")[0])
    if isinstance(value, str) and not value.isdecimal():
        return number_of(value) if value.lower().endswith(EXTENSIONS) else value
    return int(value)
