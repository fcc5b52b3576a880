"""Read the images of a shard in order, decoded ahead; report the records that cannot be used."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import Source, record_key
from jaxmm.data.tools.checking import pixel_id
from jaxmm.data.usable import read_usable
from jaxmm.inference.batching import decode_ahead, pad_batch
from jaxmm.sharding import place_batch

BATCH = 16
"""Images that are captioned or scored at a time."""
AHEAD = 64
"""Most images that are decoded in advance."""
LONGEST = 2000
"""Most characters of a caption: no text encoder reads further."""

Prepare = Callable[[Image.Image], np.ndarray]
"""Preprocessing of a model: an image to uint8 [size size 3]."""
OnBad = Callable[[str, str], None]
"""Callback that receives the key and the reason of each record that cannot be used."""


@dataclass(frozen=True)
class WebImage:
    """A record that can be used."""

    record: int
    key: str
    image_id: str
    texts: tuple[str, ...]
    views: tuple[np.ndarray, ...]
    """uint8 [size size 3], one per way of preparing the image."""


def read_images(source: Source, prepare: Sequence[Prepare], on_bad: OnBad, records: Sequence[int] | None = None
                ) -> Iterator[WebImage]:
    """Yield the images of a shard that can be decoded (of `records`; None: all), in order."""
    def load(record: int) -> WebImage:
        usable = read_usable(source, record, ())
        row, image = usable.record, usable.images[0]
        own_id = row.get("image_id") if source.image_id_scope is None else None  # others may occur in another source
        return WebImage(record, row.get("key") or record_key(source, record), own_id or pixel_id(image),
                        clean(row.get("texts", ())), tuple(view(image) for view in prepare))

    for record, future in decode_ahead(range(len(source)) if records is None else records, load, AHEAD):
        try:
            yield future.result()
        except BadRecord as error:
            on_bad(record_key(source, record), error.reason)


def grouped(images: Iterator[WebImage]) -> Iterator[list[WebImage]]:
    """Yield lists of `BATCH` images, the last one shorter."""
    while group := list(islice(images, BATCH)):
        yield group


def padded(batch: dict[str, np.ndarray], size: int, mesh: Mesh | None) -> dict[str, Any]:
    """Return `batch` padded to `size` rows, on the devices of this host's mesh."""
    batch = pad_batch(batch, size)
    del batch["mask"]
    return batch if mesh is None else place_batch(batch, mesh)


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts with white space as single spaces, cut to `LONGEST`, without blank and repeated ones."""
    spaced = (" ".join(text[:LONGEST].split()) for text in texts)
    return tuple(dict.fromkeys(text for text in spaced if text))
