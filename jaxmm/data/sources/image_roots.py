"""Find the folder that the images of an annotation file are relative to.

It is looked for in the tree of the annotations: the folder of the file, or that folder's parent if its name is one for
annotations. Many records are looked up, not the first one. A folder with the name of the file's split comes first, one
of another split is never taken, and if several fit, the user must choose one.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from jaxmm.data.base import DataError, is_hidden
from jaxmm.paths import is_address, is_bucket

LOOKED_UP = 200
"""The number of records that are looked up in every folder, evenly spaced."""
MOST_FOLDERS = 300
"""The number of subfolders that are looked into."""

_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|dev|eval|test|testing)(\d{4})?(?![a-z])")
_SAME = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "testing": "test"}
_ANNOTATIONS = re.compile(r"(\w+[_-])?annotations?([_-]\w+)?|anno|annots?|anns?")
_PERHAPS = re.compile(r"(karpathy|captions?|caption_?datasets?|questions?|vqa|okvqa|aokvqa|gqa|qa|jsons?|lists?|"
                      r"labels?|splits?|meta|metadata|texts?|data)[\W\d_]*(v\d)?")
_IMAGES = re.compile(r"images?|imgs?|pictures?|photos?|jpe?gs?|pngs?|frames?")


def locate(root: str | Path, name: str) -> str:
    """Return the path of the file `name` under `root`, however its name is written: with `\\\\`, composed or not."""
    path = os.path.join(root, name)
    if (name.isascii() and "\\" not in name) or os.path.exists(path):
        return path
    names = (name.replace("\\", "/"), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return next((other for other in (os.path.join(root, name) for name in names) if os.path.exists(other)), path)


@dataclass(frozen=True)
class Root:
    """The folder of the images."""

    path: str
    form: int
    """The number of the form of names that its images have."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fit:
    folder: Path
    tree: Path
    form: int
    hits: int
    """The number of looked up images that are there."""
    first: str
    """The first of them."""
    splits: frozenset[tuple[str, str]]


def find_root(
    spec: str, file: Path, forms: Sequence[Sequence[str]], *, root: Path | None = None, split: str | None = None,
    relative: bool = False,
) -> Root:
    """Return the folder of the images that `file` lists. Raises `DataError` if there is none, or if several fit.

    `forms` are the names of all images, in every form that they may have. `root` is what the user says. With
    `relative` the folder of the file comes first.
    """
    count = len(forms[0]) if forms else 0
    places = np.unique(np.linspace(0, max(count - 1, 0), min(LOOKED_UP, count)).round().astype(int)).tolist()
    samples = [[names[i] for i in places if names[i] and not is_address(names[i])] for names in forms]
    base = file.absolute().parent if root is None else root
    if is_bucket(base):
        return _bucket_root(spec, base, samples)
    if not any(samples) or all(map(os.path.isabs, samples[0])):
        return Root(str(base), 0)
    own = _split_words(split or "") or _split_words(file.stem)
    sought = len(samples[0])
    named = own | _common_words(samples[0])
    if relative and root is None:
        fits = _fits((base,), samples)
        if fits and fits[0].hits == sought:
            return Root(str(base), fits[0].form)
    if root is not None:
        fits = _fits((root,), samples) or _fits(_subfolders(root), samples, tree=root)
        if not fits and (form := next((form for form, names in enumerate(forms) if any(
                name and os.path.exists(locate(root, name)) for name in names)), None)) is not None:
            return Root(str(root), form)
    else:
        fits = _fits_near(file, samples, own | named)
    allowed = [fit for fit in fits if not own or not fit.splits or _share(fit.splits, named)]
    best = max((fit.hits for fit in allowed), default=0)
    allowed = [fit for fit in allowed if 2 * fit.hits >= best]
    near = [fit for fit in allowed if fit.folder == base]
    choice = [fit for fit in allowed if _share(fit.splits, own)]
    choice = (relative and near) or choice or near or allowed
    if len(choice) == 1:
        [fit] = choice
        note = f"{sought - fit.hits} of {sought} images that were looked up are not in {fit.folder}"
        return Root(str(fit.folder), fit.form, (note,) if fit.hits < sought else ())
    say = f"Say where they are: {spec}@DIR" if root is None else "Name the folder that they are in"
    if choice:
        raise DataError(f"source {spec!r}: its images may be in {_list(choice, sought)}. {say}")
    first = f"source {spec!r}: of {sought} images that were looked up, such as {samples[0][0]!r}, "
    if fits:
        raise DataError(f"{first}some are only in {_list(fits, sought)}, of another split. {say}")
    outside = _fits(_subfolders(base.parent), samples, tree=base.parent)[:5] if root is None else ()
    hint = f"; some of these names are in {_list(outside, sought)}, outside of its folder" if outside else ""
    where = f"under {root}" if root else f"beside {file} or in folders beside it"
    if relative and root is None:
        return Root(str(base), 0, (f"of {sought} images that were looked up, such as {samples[0][0]!r}, none is {where}"
                                   f"{hint}. {say}",))
    raise DataError(f"{first}the first image, none is {where}{hint}. {say}")


def _bucket_root(spec: str, base: Path, samples: Sequence[Sequence[str]]) -> Root:
    """Return a folder of a bucket, where other folders are not searched. Raises `DataError` if it has no image."""
    hits = [sum((base / name).exists() for name in names[::max(1, len(names) // 8)]) for names in samples]
    if any(samples) and not any(hits):
        raise DataError(f"source {spec!r}: none of the images that were looked up, such as {samples[0][0]!r}, is in "
                        f"{base}. Say where they are: {spec}@DIR")
    return Root(str(base), max(range(len(hits)), key=hits.__getitem__, default=0))


def _fits_near(file: Path, samples: Sequence[Sequence[str]], own: frozenset[tuple[str, str]]) -> list[_Fit]:
    """Return the folders in the tree of the annotations that have some of the images."""
    fits = []
    for folder in dict.fromkeys((file.absolute().parent, file.resolve().parent)):
        fits += _fits((folder, *_subfolders(folder)), samples, tree=folder)
        name, above = folder.name.lower(), folder.parent
        certain = _ANNOTATIONS.fullmatch(name)
        if certain or _PERHAPS.fullmatch(name):
            fits += [fit for fit in _fits((above, *_subfolders(above)), samples, tree=above)
                     if certain or _is_known(fit, own, samples[fit.form])]
    first: dict[str, _Fit] = {}
    for fit in fits:
        first.setdefault(fit.first, fit)
    return list(first.values())


def _is_known(fit: _Fit, own: frozenset[tuple[str, str]], names: Sequence[str]) -> bool:
    """Return whether a folder is named like one of images or the split, or the records name folders in it."""
    words = re.split(r"[\W_\d]+", str(fit.folder.relative_to(fit.tree)).lower())
    return _share(fit.splits, own) or any(map(_IMAGES.fullmatch, words)) or all("/" in name for name in names)


def _fits(folders: Sequence[Path], samples: Sequence[Sequence[str]], tree: Path | None = None) -> list[_Fit]:
    fits: dict[str, _Fit] = {}
    for folder in folders:
        if len(folders) > 20 and not any(_present(folder, names[::8]) for names in samples):
            continue
        hits = [_present(folder, names) for names in samples]
        form = max(range(len(hits)), key=lambda form: len(hits[form]))
        if hits[form]:
            first, top = os.path.realpath(hits[form][0]), tree or folder
            splits = _split_words(os.path.relpath(folder, top))
            fits.setdefault(first, _Fit(folder, top, form, len(hits[form]), first, splits))
    return list(fits.values())


def _present(folder: Path, names: Sequence[str]) -> list[str]:
    return [path for path in (locate(folder, name) for name in names) if os.path.isfile(path)]


def _subfolders(folder: Path, depth: int = 2) -> list[Path]:
    """Return folders in `folder` and, for a `depth` of 2, in these; not the hidden ones and those of the system."""
    return list(islice(_walk(folder, depth), MOST_FOLDERS))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            inner = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    except OSError:
        return
    yield from (folder / name for name in inner)
    for name in inner if depth > 1 else ():
        yield from _walk(folder / name, depth - 1)


def _split_words(text: str) -> frozenset[tuple[str, str]]:
    """Return the names of splits in `text`, each with its year."""
    return frozenset((_SAME.get(word, word), year) for word, year in _SPLIT.findall(text.lower()))


def _common_words(names: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Return the names of splits that occur in at least half of the `names`."""
    counts = Counter(word for name in names for word in _split_words(name))
    return frozenset(word for word, count in counts.items() if 2 * count >= len(names))


def _share(one: frozenset[tuple[str, str]], other: frozenset[tuple[str, str]]) -> bool:
    return any(word == name and (year == number or not year or not number)
               for word, year in one for name, number in other)


def _list(fits: Sequence[_Fit], sought: int) -> str:
    return ", ".join(f"{fit.folder} ({fit.hits} of {sought})" for fit in fits[:8])
