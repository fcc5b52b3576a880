"""Pictures of a shard as a model sees them, decoded a little ahead, in order; what cannot be used is named."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxmm.data.bad_records import BadRecord, read_record
from jaxmm.data.base import Source, record_key
from jaxmm.data.images import decode
from jaxmm.data.tools.checking import pixel_id
from jaxmm.sharding import place_batch

AHEAD = 64
"""Pictures that wait decoded, at most."""
LONGEST = 2000
"""Characters of a caption that are kept: no text encoder reads further."""

OnBad = Callable[[str, str], None]
"""Told the key and the reason of each record that cannot be used."""


@dataclass(frozen=True)
class Picture:
    """A record that can be used."""

    record: int
    key: str
    image_id: str
    texts: tuple[str, ...]
    views: tuple[np.ndarray, ...]
    """uint8 [size size 3], one for each way of preparing it."""


def read_pictures(
    source: Source, prepare: Sequence[Callable[[Image.Image], np.ndarray]], on_bad: OnBad,
    records: Sequence[int] | None = None,
) -> Iterator[Picture]:
    """The pictures of a shard that can be decoded (of `records`; None: all), in order."""
    def load(record: int) -> Picture:
        row = read_record(source, record)
        if "image" not in row:
            raise BadRecord("no image", "it has no picture")
        image = decode(row["image"])
        return Picture(record, row.get("key") or record_key(source, record), row.get("image_id") or pixel_id(image),
                       clean(row.get("texts", ())), tuple(each(image) for each in prepare))

    waiting = iter(range(len(source)) if records is None else records)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[tuple[int, Future]] = deque((i, pool.submit(load, i)) for i in islice(waiting, AHEAD))
        while pending:
            record, future = pending.popleft()
            try:
                yield future.result()
            except BadRecord as error:
                on_bad(record_key(source, record), error.reason)
            for following in islice(waiting, 1):
                pending.append((following, pool.submit(load, following)))


def grouped(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    """Runs of `size` pictures, the last one shorter."""
    while group := list(islice(pictures, size)):
        yield group


def filled(pictures: Sequence[Picture], view: int, size: int) -> np.ndarray:
    """One view of each, uint8 [size s s 3]; the last one again until there are `size`."""
    return np.stack([pictures[min(i, len(pictures) - 1)].views[view] for i in range(size)])


def placed(batch: dict[str, np.ndarray], mesh: Mesh | None) -> Mapping[str, Any]:
    """The batch on the devices of this host's mesh."""
    return batch if mesh is None else place_batch(batch, mesh)


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """White space as single spaces, nothing blank, nothing twice, nothing endless."""
    found = (" ".join(text[:LONGEST].split()) for text in texts)
    return tuple(dict.fromkeys(text for text in found if text))
