"""View a source by image: several records of the same image become one, with all of their captions.

Some data has one record per caption, and some one per image. Evaluators that compare images with texts read both as the
latter. Two images are the same if they have the same `image_id`, or the same bytes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from jaxmm import hosts
from jaxmm.data.bad_records import BadRecord, read_record
from jaxmm.data.base import Record, Source, record_texts
from jaxmm.data.rows import content_id, image_id


class Identity(NamedTuple):
    """The image of a record, by digests, and whether the record has a text."""

    keys: tuple[bytes, ...]
    """Digests; images that share one are the same. Empty for a record that cannot be read."""
    has_text: bool


@dataclass(frozen=True, eq=False)
class ByImage(Source):
    """The images of `source`, each with the texts of all records in its group; the first of the group is read."""

    source: Source
    groups: tuple[tuple[int, ...], ...] = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.source.name

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source."""
        return self.source.fingerprint

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes of the source."""
        return self.source.classes

    @property
    def grades_captions(self) -> bool:
        """True if the source can grade captions."""
        return self.source.grades_captions

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index: int) -> Record:
        """Read the first record of the group, with the texts of all of them."""
        record = self.source[self.groups[index][0]]
        return record | ({"texts": self.texts(index)} if "texts" in record else {})

    def key(self, index: int) -> str:
        """Return the name of the record that is read."""
        return self.source.key(self.groups[index][0])

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions of all records in the group, in order."""
        return tuple(text for record in sorted(self.groups[index]) for text in _texts(self.source, record))

    def is_true(self, index: int, caption: str) -> bool:
        """Return whether `caption` is true of the image."""
        return self.source.is_true(self.groups[index][0], caption)

    def names_largest(self, index: int, caption: str) -> bool:
        """Return whether `caption` names the largest object of the image."""
        return self.source.names_largest(self.groups[index][0], caption)


def by_image(source: Source) -> Source:
    """Return `source` with one record per image: itself if it is so already. All records are read once, not decoded."""
    groups = group_images(list(_identities(source)))
    return source if len(groups) == len(source) else ByImage(source, groups)


def original_records(source: Source, index: np.ndarray) -> np.ndarray:
    """Return the records of the source itself that are read for the records `index` of `source`, a view by image."""
    return np.array([source.groups[i][0] for i in index.tolist()]) if isinstance(source, ByImage) else index


def group_images(identities: list[Identity]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the records of each image, images in order; of a group, one with a text comes first."""
    numbers: dict[bytes, int] = {}
    edges = [(record, len(identities) + numbers.setdefault(key, len(numbers)))
             for record, identity in enumerate(identities) for key in identity.keys]
    size = len(identities) + len(numbers)
    ends = np.asarray(edges, np.int64).reshape(-1, 2)
    graph = csr_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(size, size))
    groups: dict[int, list[int]] = {}
    for record, label in enumerate(connected_components(graph, directed=False)[1][:len(identities)].tolist()):
        groups.setdefault(label, []).append(record)
    return tuple(tuple(sorted(group, key=lambda record: (not identities[record].has_text, record)))
                 for group in groups.values())


def _identities(source: Source) -> Iterator[Identity]:
    with ThreadPoolExecutor() as pool:
        for identity in pool.map(partial(_identify, source), range(len(source))):
            hosts.heartbeat("evaluating")
            yield identity


def _identify(source: Source, index: int) -> Identity:
    try:
        record = read_record(source, index)
        digests = dict.fromkeys((image_id(record).tobytes(), content_id(record).tobytes()))
    except (BadRecord, KeyError):
        return Identity((), False)
    return Identity(tuple(digests), any(text.strip() for text in record.get("texts", ())))


def _texts(source: Source, index: int) -> tuple[str, ...]:
    try:
        return record_texts(source, index)
    except Exception:  # the captions of a record that cannot be read are left out
        return ()
