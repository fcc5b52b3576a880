"""Read web datasets in CLIP_benchmark's layout, from a folder, a bucket, the Hugging Face hub or a web server.

    DIR/test/nshards.txt, DIR/test/0.tar, ...          KEY.webp (or png, jpg) with KEY.cls, KEY.txt or KEY.npy
    DIR/classnames.txt, DIR/zeroshot_classification_templates.txt      one per line; `{c}` is the place of the name
    DIR/dataset_type.txt                               `retrieval` (.txt), `multilabel` (.npy), or nothing (.cls)
"""

import contextlib
import re
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from jaxmm.atomic import write_atomically
from jaxmm.data.base import DataError, fingerprint
from jaxmm.data.sources.columns import Columns
from jaxmm.data.sources.downloads import DownloadError, NotFound, download, read_text
from jaxmm.data.sources.shards import MOST_FILES, Shards
from jaxmm.data.sources.tars import Tar
from jaxmm.paths import is_address, is_bucket, user_path
from jaxmm.user_cache import cache_folder

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
COUNT = "nshards.txt"
ADDRESS = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?/?")


def open_web_dataset(spec: str, location: str, data_dir: str | None = None) -> Shards:
    """Open `DIR[:SPLIT]`; SPLIT is `test` unless it is given.

    DIR may be in a bucket. It may also be a data set of the hub, `OWNER/NAME` or its address, which is downloaded into
    the hub's cache, or any other HTTP address, which is downloaded into jaxmm's. Raises `DataError`.
    """
    root, split = _split(location)
    if is_bucket(root):
        folder = user_path(root)
    elif re.match("https?://", root) and not ADDRESS.fullmatch(root):
        folder = _copy_of(spec, root, split)
    elif is_address(root) or (not Path(root).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", root)):
        folder = _download(spec, root, split)
    else:
        folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"source {spec!r}: no folder {root!r}")
    counted = folder / split / COUNT
    if not counted.is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{COUNT}"))
        raise DataError(f"source {spec!r}: no {counted}; expected "
                        + (f"one of the splits {', '.join(splits)}, as in wds:{root}:{splits[0]}" if splits else
                           "CLIP_benchmark's layout. Are they only tars? tars:'DIR/*.tar'"))
    count = _count(spec, counted, counted.read_text())
    paths = [folder / split / f"{number}.tar" for number in range(count)]
    present = {path.name for path in counted.parent.iterdir()}
    if missing := [path.name for path in paths if path.name not in present]:
        raise DataError(f"source {spec!r}: {missing[0]} is missing; {counted} says {count} shards")
    kind = " ".join(_lines(folder / TYPE)).lower() or "classification"
    if kind not in ("classification", "multilabel", "retrieval"):
        raise DataError(f"source {spec!r}: its {TYPE} is {kind!r}; expected classification, multilabel or retrieval")
    names = _lines(folder / NAMES) if kind != "retrieval" else ()
    if kind != "retrieval" and not names:
        raise DataError(f"source {spec!r}: no {NAMES}; expected one class name per line, or 'retrieval' in {TYPE}")
    labels = {"classification": {"classes": names}, "multilabel": {"tags": names}, "retrieval": {}}[kind]
    columns = Columns({"label": "npy"} if kind == "multilabel" else {})
    templates = tuple(line.replace("{c}", "{}") for line in _lines(folder / TEMPLATES))
    parts = tuple(Tar(path, path.stem, columns, clip_benchmark=True, **labels) for path in paths)
    return Shards(name=spec, parts=parts, templates=templates or None, **labels)


def _split(location: str) -> tuple[str, str]:
    """Return the root and the split of a location."""
    root, colon, split = location.rpartition(":")
    if not colon or "/" in split or Path(location).is_dir() or re.fullmatch(r"https?://[^/:]+:\d+", location):
        return location.rstrip("/"), "test"
    return root.rstrip("/"), split


def _count(spec: str, place: Path | str, text: str) -> int:
    """Return the number of shards that `text`, the content of `place`, says. Raises `DataError`."""
    text = text.strip()
    if not re.fullmatch("0*[1-9][0-9]{,6}", text) or int(text) > MOST_FILES:
        raise DataError(f"source {spec!r}: {place} is {text[:40]!r}; expected the number of shards")
    return int(text)


def _lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a file, which are empty strings if they are blank; () if there is no such file."""
    return tuple(map(str.strip, path.read_text(encoding="utf-8").splitlines())) if path.is_file() else ()


def _download(spec: str, root: str, split: str) -> Path:
    """Return the folder with the texts and one split of a data set of the hub."""
    import huggingface_hub
    from huggingface_hub import errors

    address = ADDRESS.fullmatch(root)
    if is_address(root) and not address:
        raise DataError(f"source {spec!r}: {root!r} is no data set of the hub; expected a folder, OWNER/NAME or an "
                        "address (https://...)")
    name, revision = address.groups() if address else (root, None)
    try:
        return Path(huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=["*.txt", f"{split}/*"]))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"source {spec!r}: {name} is no folder, and cannot be downloaded from the hub: {reason}"
                        ) from None


def _copy_of(spec: str, root: str, split: str) -> Path:
    """Return the folder with a copy of the texts and one split of a data set at an HTTP address.

    It is made once; the number of shards is written when all of them are there.
    """
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise DataError(f"source {spec!r}: the split is {split!r}; expected a name, such as test")
    folder = cache_folder() / "web-datasets" / f"{root.rpartition('/')[2]}-{fingerprint([root])}"
    place, counted = f"{root}/{split}/{COUNT}", folder / split / COUNT
    if counted.is_file():
        return folder
    counted.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock"):
            text = read_text(place)
            count = _count(spec, place, text)
            for name in (NAMES, TEMPLATES, TYPE):
                with contextlib.suppress(NotFound):
                    write_atomically(folder / name, read_text(f"{root}/{name}"))
            for number in tqdm(range(count), desc=f"downloading {root}", unit=" shards", leave=False, disable=None):
                shard = folder / split / f"{number}.tar"
                if not shard.exists():
                    download(f"{root}/{split}/{shard.name}", shard)
            write_atomically(counted, text)
    except NotFound as error:
        raise DataError(f"source {spec!r}: {error}; expected CLIP_benchmark's layout") from None
    except DownloadError as error:
        raise DataError(f"source {spec!r}: {error}") from None
    return folder
