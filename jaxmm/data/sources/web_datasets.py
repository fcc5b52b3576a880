"""Read web datasets in CLIP_benchmark's layout, from a folder or from the Hugging Face hub.

    DIR/test/nshards.txt, DIR/test/0.tar, ...          KEY.webp (or png, jpg) with KEY.cls, or with KEY.txt
    DIR/classnames.txt, DIR/zeroshot_classification_templates.txt      one per line; `{c}` is the place of the name
    DIR/dataset_type.txt                               `retrieval`, or nothing
"""

import re
from pathlib import Path

from jaxmm.data.base import DataError
from jaxmm.data.sources.shards import Shards
from jaxmm.data.sources.tars import Tar
from jaxmm.paths import is_address

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
ADDRESS = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?/?")


def open_web_dataset(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open `DIR[:SPLIT]`; SPLIT is `test` unless it is given.

    DIR may also be a data set of the hub, `OWNER/NAME` or its address, which is downloaded into the hub's cache. Raises
    `DataError`.
    """
    root, split = _split(location)
    if is_address(root) or (not Path(root).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", root)):
        folder = _download(spec, root, split)
    else:
        folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"source {spec!r}: no folder {root!r}")
    counted = folder / split / "nshards.txt"
    if not counted.is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/nshards.txt"))
        raise DataError(f"source {spec!r}: no {counted}; expected "
                        + (f"one of the splits {', '.join(splits)}, as in wds:{root}:{splits[0]}" if splits else
                           "CLIP_benchmark's layout. Are they only tars? tars:'DIR/*.tar'"))
    count = counted.read_text().strip()
    paths = [folder / split / f"{number}.tar" for number in range(int(count) if count.isdecimal() else 0)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"source {spec!r}: {missing[0]} is missing; {counted} says {count} shards")
    if not paths:
        raise DataError(f"source {spec!r}: {counted} is {count[:40]!r}; expected the number of shards")
    kind = " ".join(_lines(folder / TYPE)).lower() or "classification"
    if kind not in ("classification", "retrieval"):
        raise DataError(f"source {spec!r}: its {TYPE} is {kind!r}; expected classification or retrieval")
    classes = _lines(folder / NAMES) if kind == "classification" else ()
    if kind == "classification" and not classes:
        raise DataError(f"source {spec!r}: no {NAMES}; expected one class name per line, or 'retrieval' in {TYPE}")
    templates = tuple(line.replace("{c}", "{}") for line in _lines(folder / TEMPLATES))
    parts = tuple(Tar(path, path.stem, classes=classes or None, clip_benchmark=True) for path in paths)
    return Shards(name=spec, parts=parts, classes=classes or None, templates=templates or None)


def _split(location: str) -> tuple[str, str]:
    """Return the root and the split of a location."""
    root, colon, split = location.rpartition(":")
    if not colon or "/" in split or Path(location).is_dir():
        return location.rstrip("/"), "test"
    return root.rstrip("/"), split


def _lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a file, which are empty strings if they are blank; () if there is no such file."""
    return tuple(map(str.strip, path.read_text(encoding="utf-8").splitlines())) if path.is_file() else ()


def _download(spec: str, root: str, split: str) -> Path:
    """Return the folder with the texts and one split of a data set of the hub."""
    import huggingface_hub
    from huggingface_hub import errors

    address = ADDRESS.fullmatch(root)
    if is_address(root) and not address:
        raise DataError(f"source {spec!r}: {root!r} is no data set of the hub; expected a folder, OWNER/NAME or "
                        "https://huggingface.co/datasets/OWNER/NAME")
    name, revision = address.groups() if address else (root, None)
    try:
        return Path(huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=["*.txt", f"{split}/*"]))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"source {spec!r}: {name} is no folder, and cannot be downloaded from the hub: {reason}"
                        ) from None
