"""Read tests with foils: captions that are nearly right. SugarCrepe (arXiv:2306.14610) and Winoground
(arXiv:2204.03162)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.sources.annotations import Row, read_json, read_rows
from jaxmm.data.sources.columns import read_location
from jaxmm.data.sources.files import read_image
from jaxmm.data.sources.image_roots import find_root
from jaxmm.paths import exists, user_path


@dataclass(frozen=True, kw_only=True)
class FoilCaptions(Source):
    """One or two images in files under `root`, and two captions: the first is of the first image; the second is of the
    second image, or of none."""

    name: str
    root: str
    files: Sequence[tuple[str, ...]]
    captions: Sequence[tuple[str, str]]
    images_per_record: int
    faults: Mapping[int, str] = field(default_factory=dict, repr=False)
    """The reasons why rows could not be read, by record."""
    notes: tuple[str, ...] = field(default=(), repr=False)
    fingerprint: str = field(repr=False)
    has_foils = True

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of the images. Raises `BadRecord` for a row that could not be read."""
        if index in self.faults:
            raise BadRecord("malformed", f"{self.files[index][0]} {self.faults[index]}")
        images = tuple(read_image(self.root, file) for file in self.files[index])
        return {"key": self.key(index), "image": images[0] if len(images) == 1 else images,
                "texts": self.captions[index]}

    def key(self, index: int) -> str:
        """Return the first image file and the record number."""
        return f"{self.files[index][0]}#{index}"

    def texts(self, index: int) -> tuple[str, ...]:
        """Return both captions."""
        return self.captions[index]


def open_sugar_crepe(spec: str, location: str, data_dir: str | None = None) -> FoilCaptions:
    """Open a file of SugarCrepe: entries with `filename`, `caption` and `negative_caption`. Raises `DataError`."""
    place = read_location(spec, location, exists=exists)
    content = read_json(spec, place.path).content
    entries = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    rows = [Row(f" entry {name}", value if isinstance(value, dict) else None, "is no object")
            for name, value in entries]
    return _foils(spec, place.path, place.root, rows, ("filename",), ("caption", "negative_caption"))


def open_winoground(spec: str, location: str, data_dir: str | None = None) -> FoilCaptions:
    """Open Winoground's `examples.jsonl`, with its images in `images/` beside it, or in DIR. Raises `DataError`."""
    place = read_location(spec, location, exists=exists)
    read = read_rows(spec, place.path, place.columns, ("image_0", "caption_0"))
    rows = read.rows or ((Row(":1", read.content),) if isinstance(read.content, dict) else ())
    return _foils(spec, place.path, place.root, rows, ("image_0", "image_1"), ("caption_0", "caption_1"))


def _foils(spec: str, path: str, root: Path | None, rows: Sequence[Row], images: tuple[str, ...],
           captions: tuple[str, str]) -> FoilCaptions:
    """Return the source of `rows`, whose images and captions are in the fields of these names."""
    expected = f"expected an object with {', '.join((*images, *captions))}"
    names, texts, faults = [], [], {}
    for number, row in enumerate(rows):
        values = [str((row.value or {}).get(name) or "").strip() for name in (*images, *captions)]
        if not all(values):
            faults[number] = row.fault if row.value is None else expected
            values = [f"{Path(path).name}{row.place}"] * len(images) + ["", ""]
        names.append(tuple(values[:len(images)]))
        texts.append((values[-2], values[-1]))
    if len(faults) == len(rows):
        raise DataError(f"source {spec!r}: {path}{rows[0].place if rows else ''}: {expected}")
    first = ["" if number in faults else files[0] for number, files in enumerate(names)]
    forms = [first, *([name and f"{name}{ending}" for name in first] for ending in (".png", ".jpg"))]
    place = find_root(spec, user_path(path), forms, root=root)
    ending = ("", ".png", ".jpg")[place.form]                   # Winoground's names have none
    return FoilCaptions(
        name=spec, root=place.path, files=[tuple(f"{file}{ending}" for file in files) for files in names],
        captions=texts, images_per_record=len(images), faults=faults, notes=place.notes,
        fingerprint=fingerprint([*names, *texts]))
