"""Show the first records of a source: rows of a table, or one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmm.atomic import write_atomically
from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import Source, record_key
from jaxmm.data.cleaning import printable
from jaxmm.data.tools.checking import examine
from jaxmm.optional import require_extra

LARGEST = 320
"""Pixels of the longer side of an image on the page."""
LONGEST = 300
"""The largest number of characters of a caption that are shown."""

_PAGE = """\
<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ source }}</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color-scheme: light dark; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; overflow-wrap: anywhere; } img { max-width: 100%; } small { opacity: .7; }
</style>
<h1>{{ source }}</h1>
<main>
{% for record in records %}
<figure>
{% for image in record.images %}<img src="{{ thumbnail(image) }}" alt="">{% endfor %}

<figcaption><small>{{ record.key }} · {{ record.size }}</small>
{% for text in record.texts %}<p>{{ text }}</p>{% endfor %}</figcaption>
</figure>
{% endfor %}
</main>
"""


@dataclass(frozen=True)
class Shown:
    """The texts and images of a record that are shown."""

    key: str
    size: str
    """The size of each image, or the reason why the record cannot be used."""
    texts: tuple[str, ...]
    images: tuple[Image.Image, ...]


def first(source: Source, count: int) -> list[Shown]:
    """Return the first `count` records, also those that cannot be used."""
    return [_shown(source, index) for index in range(min(count, len(source)))]


def write_html(title: str, records: Sequence[Shown], path: Path) -> None:
    """Write one page with images and texts; nothing in it is loaded from elsewhere."""
    require_extra("train", "an HTML page")
    import jinja2

    from jaxmm.pages import data_uri

    def thumbnail(image: Image.Image) -> str:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
        return data_uri(np.asarray(image))

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    write_atomically(path, page.render(source=printable(title), records=records, thumbnail=thumbnail))


def _shown(source: Source, index: int) -> Shown:
    try:
        key, usable = examine(source, index)
    except BadRecord as error:
        return Shown(record_key(source, index), printable(str(error)), (), ())
    labels = usable.record.get("tags", ()) if usable.label is None else (usable.label,)
    texts = (*((source.classes or source.tags)[label] for label in labels), *usable.texts)
    sizes = ", ".join(f"{image.width} x {image.height}" for image in usable.images)
    return Shown(printable(key), sizes, tuple(map(_cut, texts)), usable.images)


def _cut(text: str) -> str:
    text = printable(" ".join(text[:4 * LONGEST].split()))
    return text if len(text) <= LONGEST else text[:LONGEST - 1] + "…"
