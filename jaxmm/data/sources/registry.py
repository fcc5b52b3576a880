"""Open a source from one string, such as `coco:FILE.json:val` or `3*captions:own.jsonl + tfds:web:train`.

To add a kind: write one file and one row of `KINDS`, or call `register_source` in your own module.
"""

import difflib
import importlib
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxmm.data.base import DataError, Source
from jaxmm.data.sources.mixed import Mixed
from jaxmm.paths import expand, is_address, is_bucket

log = logging.getLogger(__name__)

Opener = Callable[[str, str, str | None], Source]
"""`(spec, location, data_dir) -> Source`: the full string, what follows its colon, and where TFDS data sets are."""


class Kind(NamedTuple):
    """A row of `KINDS`: the opener's module, which is imported at first use, and its name there."""

    module: str
    opener: str
    location: str
    """The form of what follows the colon."""
    addresses: bool = False
    """True if it may be an address."""
    buckets: bool = False
    """True if it may be in a bucket."""


KINDS: dict[str, Kind] = {
    "captions": Kind("jaxmm.data.sources.caption_lists", "open_captions", "FILE.jsonl[@DIR]", buckets=True),
    "coco": Kind("jaxmm.data.sources.coco", "open_coco", "FILE.json[:SPLIT][@DIR]", buckets=True),
    "digits": Kind("jaxmm.data.sources.files", "open_digits", "SPLIT"),
    "folder": Kind("jaxmm.data.sources.files", "open_folder", "DIR", buckets=True),
    "nlvr": Kind("jaxmm.data.sources.nlvr", "open_nlvr", "FILE.json[@DIR]", buckets=True),
    "parquet": Kind("jaxmm.data.sources.parquet", "open_parquet", "GLOB", buckets=True),
    "scenes": Kind("jaxmm.data.scenes", "open_spec", "SPLIT"),
    "shapes": Kind("jaxmm.data.scenes.one_shape", "open_shapes", "SPLIT"),
    "tars": Kind("jaxmm.data.sources.tars", "open_tars", "GLOB", buckets=True),
    "tfds": Kind("jaxmm.data.sources.tfds", "open_tfds", "NAME:SPLIT", buckets=True),
    "sugarcrepe": Kind("jaxmm.data.sources.foil_captions", "open_sugar_crepe", "FILE.json[@DIR]",
                       buckets=True),
    "vqa": Kind("jaxmm.data.sources.vqa", "open_questions", "FILE[@DIR]", buckets=True),
    "wds": Kind("jaxmm.data.sources.web_datasets", "open_web_dataset", "DIR|REPOSITORY[:SPLIT]", addresses=True),
    "winoground": Kind("jaxmm.data.sources.foil_captions", "open_winoground", "FILE.jsonl[@DIR]",
                       buckets=True),
}
REGISTERED: dict[str, tuple[Opener, str]] = {}
"""Openers that `register_source` added, each with the form of its location."""

_PLUS = re.compile(r"\s\+\s(?=(?:\d+\s*\*\s*)?[a-z]+:)")
_WEIGHT = re.compile(r"(\d+)\s*\*\s*(.*)", re.DOTALL)


def register_source(kind: str, opener: Opener, location: str = "LOCATION") -> None:
    """Make `open_source("KIND:LOCATION")` call `opener(spec, location, data_dir)`.

    Call it in the module that defines the source; then `data.train` can name it. A second call replaces the first.
    Raises `ValueError` for a `kind` that is built in or is not in lower-case letters.
    """
    if kind in KINDS or not re.fullmatch("[a-z]+", kind):
        raise ValueError(f"kind is {kind!r}; expected lower-case letters, other than {', '.join(KINDS)}")
    REGISTERED[kind] = opener, location


def open_source(spec: str, *, data_dir: str | None = None) -> Source:
    """Open the source that `spec` names; `data_dir` is where prepared TFDS data sets are. Raises `DataError`."""
    if _PLUS.search(spec) or _WEIGHT.fullmatch(spec):
        return _open_mixed(spec, data_dir)
    kind, colon, location = spec.partition(":")
    forms = {name: row.location for name, row in KINDS.items()} | {name: row[1] for name, row in REGISTERED.items()}
    if kind not in forms:
        nearest = difflib.get_close_matches(kind, forms, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise DataError(f"source {spec!r}: unknown kind {kind!r}{hint}; expected one of "
                        + ", ".join(f"{name}:{form}" for name, form in forms.items()))
    if not colon or not location:
        raise DataError(f"source {spec!r}: expected {kind}:{forms[kind]}")
    if kind in REGISTERED:  # which may read from anywhere
        opener = REGISTERED[kind][0]
    else:
        opener = getattr(importlib.import_module(KINDS[kind].module), KINDS[kind].opener)
        if not (KINDS[kind].addresses and is_address(location)):
            location = _local(spec, location, KINDS[kind].buckets)
        data_dir = data_dir and expand(data_dir, "data_dir")
    source = opener(spec, location, data_dir)
    if not source:  # not its length: a source of many shards would read all of them
        raise DataError(f"source {spec!r} is empty: it has no records")
    for note in source.notes:
        log.warning("source %r: %s", spec, note)
    return source


def _local(spec: str, path: str, buckets: bool) -> str:
    if path.startswith("pipe:") or (is_address(path) and not (buckets and is_bucket(path))):
        raise DataError(f"source {spec!r}: {path!r} is no local path{' or in a bucket (gs://, s3://)' * buckets}; "
                        f"expected one: {'other ' * buckets}addresses are not supported")
    return expand(path)


def _open_mixed(spec: str, data_dir: str | None) -> Mixed:
    """Open `WEIGHT*SOURCE + WEIGHT*SOURCE + ...`; a weight is a whole number, 1 if it is left out."""
    parts, weights = [], []
    for term in map(str.strip, _PLUS.split(spec)):
        weighted = _WEIGHT.fullmatch(term)
        weights.append(int(weighted[1]) if weighted else 1)
        if weights[-1] < 1:
            raise DataError(f"source {spec!r}: the weight of {term!r} is {weights[-1]}; expected 1 or more")
        parts.append(open_source(weighted[2] if weighted else term, data_dir=data_dir))
    for part in parts:
        if (part.classes, part.images_per_record) != (parts[0].classes, parts[0].images_per_record):
            raise DataError(f"source {spec!r}: {part.name!r} has other classes or another number of images per record "
                            f"than {parts[0].name!r}")
        if part.varies or part.most_answers:
            raise DataError(f"source {spec!r}: {part.name!r} cannot be mixed with others")
    return Mixed(spec, tuple(parts), tuple(weights))
