"""Write the report of a CapFilt folder: noise, texts that stay, diversity of the captions, and examples."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.capfilt.selection import REASONS
from jaxmm.capfilt.stages import SELECTED, Folder
from jaxmm.capfilt.tables import Texts, score_names, totals
from jaxmm.charts import histogram
from jaxmm.data.images import decode
from jaxmm.evals.context import evenly_spaced
from jaxmm.pages import write_page

ORIGINS = ("web", "synthetic", "human")
LABELS = {"itm": "probability that text and image belong together", "itc": "cosine"}
"""What the scores of a filter without a name are."""
SIDE = 160
"""Most pixels of the longer side of an image in the report."""


@dataclass(frozen=True)
class Diversity:
    """Measures of how much texts differ from each other."""

    texts: int
    distinct: float
    """Share of distinct texts."""
    words: float
    """Mean words per text."""
    vocabulary: int
    """Number of distinct words."""
    distinct_1: float
    """Distinct words over all words (Li et al. 2016, "A diversity-promoting objective function")."""
    distinct_2: float
    """Distinct pairs of adjacent words over all such pairs."""


def diversity(texts: Iterable[str]) -> Diversity:
    """Return the diversity of `texts`; words are split at white space, in lower case."""
    count, different, single, double = 0, set(), Counter(), Counter()
    for text in texts:
        words = text.lower().split()
        count += 1
        different.add(text)
        single.update(words)
        double.update(itertools.pairwise(words))

    def share(counts: Counter) -> float:
        return len(counts) / max(counts.total(), 1)

    return Diversity(count, len(different) / max(count, 1), single.total() / max(count, 1), len(single), share(single),
                     share(double))


def measure(shards: Sequence[Texts]) -> dict[str, Any]:
    """Return the numbers of the report.

    `origins` has for each origin the counts `texts` and `kept`, `noise` (the share that is dropped), `diversity` of all
    and of the kept texts, and counts by `reasons`. `pictures` is the number of images, `left` that of images that keep
    a text, `near_duplicates` that of images that are nearly the same as another one, and `bad` that of bad records by
    reason.
    """
    images, bad = totals(shards)
    measured: dict[str, Any] = {"pictures": images, "bad": dict(bad.most_common()), "origins": {}, "left": 0,
                                "near_duplicates": 0}
    for shard in shards:
        record, kept = np.asarray(shard.columns["record"], np.int64), np.asarray(shard.columns["kept"], bool)
        measured["left"] += len(np.unique(record[kept]))
        measured["near_duplicates"] += len(np.unique(record[np.asarray(
            shard.columns.get("near_duplicate", np.zeros(len(record))), bool)]))
    for origin in ORIGINS:
        rows = [(text, kept, why) for shard in shards for text, kept, why, own in zip(
            *(shard.columns[name] for name in ("text", "kept", "why", "origin")), strict=True) if own == origin]
        if rows:
            kept = [text for text, stays, _ in rows if stays]
            measured["origins"][origin] = {
                "texts": len(rows), "kept": len(kept), "noise": 1 - len(kept) / len(rows),
                "reasons": dict(Counter(why for *_, why in rows).most_common()),
                "diversity": {"all": diversity(text for text, *_ in rows), "kept": diversity(kept)}}
    return measured


def write_report(folder: Folder, examples: int = 24) -> Path:
    """Write `report.html` from the selected texts and return its path."""
    shards = folder.tables(SELECTED)
    names = score_names(shards[0].columns)
    drawn = []
    for key in names:
        label = LABELS.get(key, key)
        scores = {origin: np.concatenate([shard[key][shard["origin"] == origin] for shard in shards])
                  for origin in ORIGINS}
        values = {origin: score for origin, score in scores.items() if len(score)}
        if any(np.isfinite(score).any() for score in values.values()):
            drawn.append((label, list(values), histogram(values, label)))
    manifest = folder.manifest
    return write_page(
        folder.path / "report.html", "capfilt/report.html.jinja", title=folder.path.resolve().name, kind="CapFilt",
        measured=measure(shards), reasons=REASONS, names=names, drawn=drawn, rule=manifest.get("rule", {}),
        least=manifest.get("least"), manifest=manifest, examples=list(_examples(folder, shards, examples)),
        named=[example for shard in shards for example in shard.examples][:20])


def _examples(folder: Folder, shards: Sequence[Texts], count: int) -> Iterable[tuple[np.ndarray, list[dict]]]:
    """Yield evenly spaced images of the web with the rows of their texts."""
    web = [i for i, shard in enumerate(folder.shards) if shard.origin == "web"]
    places = [(i, record) for i in web for record in sorted(set(shards[i].columns["record"]))]
    for place in evenly_spaced(len(places), count):
        i, record = places[place]
        columns = shards[i].columns
        rows = [{name: columns[name][j] for name in ("text", "origin", "kept", "why")}
                | {"scores": [float(columns[name][j]) for name in score_names(columns)]}
                for j in np.flatnonzero(np.asarray(columns["record"]) == record)]
        image = decode(folder.shards[i].source[record]["image"])
        image.thumbnail((SIDE, SIDE))
        yield np.asarray(image), rows
