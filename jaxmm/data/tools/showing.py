"""The first records of a source, for eyes: rows of a table, or one HTML page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmm.atomic import write_atomically
from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import Source, record_key
from jaxmm.data.sources.shards import printable
from jaxmm.data.tools.checking import examine
from jaxmm.optional import require_extra

LARGEST = 320
"""Pixels of the longer side on the page."""
LONGEST = 300
"""Letters of a caption that are shown."""

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
{% if record.image is not none %}<img src="{{ picture(record.image) }}" alt="">{% endif %}
<figcaption><small>{{ record.key }} · {{ record.size }}</small>
{% for text in record.texts %}<p>{{ text }}</p>{% endfor %}</figcaption>
</figure>
{% endfor %}
</main>
"""


@dataclass(frozen=True)
class Shown:
    """A record as it is shown."""

    key: str
    size: str
    """Of the picture; of a record that cannot be used, why."""
    texts: tuple[str, ...]
    image: Image.Image | None


def first(source: Source, count: int) -> list[Shown]:
    """The first `count` records, those that cannot be used too."""
    return [_shown(source, index) for index in range(min(count, len(source)))]


def write_html(title: str, records: Sequence[Shown], path: Path) -> None:
    """Writes one page with pictures and texts; nothing in it is loaded from elsewhere."""
    require_extra("train", "an HTML page")
    import jinja2

    from jaxmm.pages import data_uri

    def small(image: Image.Image) -> str:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
        return data_uri(np.asarray(image))

    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    write_atomically(path, page.render(source=title, records=records, picture=small))


def _shown(source: Source, index: int) -> Shown:
    try:
        record = examine(source, index)
    except BadRecord as error:
        return Shown(printable(record_key(source, index)), printable(str(error)), (), None)
    texts = record.texts if record.label is None else (source.classes[record.label], *record.texts)
    return Shown(printable(record.key), f"{record.image.width} x {record.image.height}", tuple(map(_cut, texts)),
                 record.image)


def _cut(text: str) -> str:
    text = printable(" ".join(text[:4 * LONGEST].split()))
    return text if len(text) <= LONGEST else text[:LONGEST - 1] + "…"
