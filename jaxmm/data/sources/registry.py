"""Where pictures and words come from: one string names a source, which is read by record number.

`folder:DIR`, `captions:FILE.jsonl`, `coco:FILE.json[:SPLIT]`, `nlvr:FILE.json`, `digits:SPLIT`, `scenes:SPLIT`,
`tfds:NAME:SPLIT`, `vqa:PLACE`, `tars:GLOB` and `parquet:GLOB`.
"""

import difflib
from collections.abc import Callable

from jaxmm.data.base import DataError, Source
from jaxmm.data.sources.files import Files, open_captions, open_digits, open_folder


def open_source(spec: str, *, data_dir: str | None = None) -> Source:
    """Opens the source that `spec` names; `data_dir` is where prepared TFDS data sets lie. Raises `DataError`."""
    from jaxmm.data.sources import mixed

    if mixed.is_mixed(spec):
        return mixed.open_mixed(spec, data_dir)
    kind, colon, location = spec.partition(":")
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise DataError(f"source {spec!r}: unknown kind {kind!r}{hint}; wanted one of "
                        + ", ".join(f"{name}:{what}" for name, (_, what) in KINDS.items()))
    opener, what = KINDS[kind]
    if not colon or not location:
        raise DataError(f"source {spec!r}: wanted {kind}:{what}")
    source = opener(spec, location, data_dir)
    if not source:  # not its length, for which sources of many shards read all of them
        raise DataError(f"source {spec!r} is empty: it has no records")
    return source


def open_coco(spec: str, location: str, data_dir: str | None = None) -> Files:
    """COCO's captions, Karpathy's splits of them, or BLIP's lists of those."""
    from jaxmm.data.sources import coco

    return coco.open_coco(spec, location)


def open_scenes(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Our own pictures of coloured shapes, generated on first use."""
    from jaxmm.data import scenes

    return scenes.open_scenes(location, data_dir)


def open_nlvr(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Sentences about two pictures."""
    from jaxmm.data.sources import nlvr

    return nlvr.open_nlvr(spec, location)


def open_tfds(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Any TFDS data set that was prepared as ArrayRecord."""
    from jaxmm.data.sources import tfds

    return tfds.open_tfds(spec, location, data_dir)


def open_tars(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Tar shards as img2dataset and WebDataset write them."""
    from jaxmm.data.sources import tars

    return tars.open_tars(spec, location)


def open_parquet(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Parquet files that hold the pictures' bytes."""
    from jaxmm.data.sources import parquet

    return parquet.open_parquet(spec, location)


def open_vqa(spec: str, location: str, data_dir: str | None = None) -> Source:
    """Questions about pictures, with answers."""
    from jaxmm.data.sources import vqa

    return vqa.open_questions(spec, location, data_dir)


Opener = Callable[[str, str, str | None], Source]

KINDS: dict[str, tuple[Opener, str]] = {
    "captions": (open_captions, "FILE.jsonl"),
    "coco": (open_coco, "FILE.json[:SPLIT]"),
    "digits": (open_digits, "SPLIT"),
    "folder": (open_folder, "DIR"),
    "nlvr": (open_nlvr, "FILE.json"),
    "parquet": (open_parquet, "GLOB"),
    "scenes": (open_scenes, "SPLIT"),
    "tars": (open_tars, "GLOB"),
    "tfds": (open_tfds, "NAME:SPLIT"),
    "vqa": (open_vqa, "PLACE"),
}
"""What a spec can begin with: how it is opened, and what follows the colon."""
