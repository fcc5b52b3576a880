"""The report of a CapFilt folder: what was noise, what stays, how captions differ, and pictures to look at."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.capfilt.selection import REASONS
from jaxmm.capfilt.stages import SELECTED, Folder
from jaxmm.capfilt.tables import Texts, totals
from jaxmm.data.images import decode
from jaxmm.evals.context import spread
from jaxmm.pages import write_page
from jaxmm.training.report import histogram

ORIGINS = ("web", "synthetic", "human")
SIDE = 160
"""Pixels of a picture in the report, at most."""


@dataclass(frozen=True)
class Diversity:
    """How texts differ from each other."""

    texts: int
    distinct: float
    """Share of texts that are there once, each counted once."""
    words: float
    """Mean length."""
    vocabulary: int
    """Distinct words."""
    distinct_1: float
    """Distinct words over all words (Li et al. 2016, "A diversity-promoting objective function")."""
    distinct_2: float
    """The same of pairs of words that follow each other."""


def diversity(texts: Iterable[str]) -> Diversity:
    """Of `texts`, their words being what white space parts, in lower case."""
    count, different, single, double = 0, set(), Counter(), Counter()
    for text in texts:
        words = text.lower().split()
        count += 1
        different.add(text)
        single.update(words)
        double.update(itertools.pairwise(words))

    def share(found: Counter) -> float:
        return len(found) / max(found.total(), 1)

    return Diversity(count, len(different) / max(count, 1), single.total() / max(count, 1), len(single), share(single),
                     share(double))


def measure(shards: Sequence[Texts]) -> dict[str, Any]:
    """What the report says in numbers: by origin the `texts`, the `kept` ones, `noise` (the share that was dropped),
    `diversity` of all and of those kept, `reasons`; `pictures`, `bad` by reason, and `left`, pictures with a text."""
    pictures, bad = totals(shards)
    found: dict[str, Any] = {"pictures": pictures, "bad": dict(bad.most_common()), "origins": {}, "left": 0}
    for shard in shards:
        record, kept = np.asarray(shard.columns["record"], np.int64), np.asarray(shard.columns["kept"], bool)
        found["left"] += len(np.unique(record[kept]))
    for origin in ORIGINS:
        rows = [(text, kept, why) for shard in shards for text, kept, why, each in zip(
            *(shard.columns[name] for name in ("text", "kept", "why", "origin")), strict=True) if each == origin]
        if rows:
            kept = [text for text, stays, _ in rows if stays]
            found["origins"][origin] = {
                "texts": len(rows), "kept": len(kept), "noise": 1 - len(kept) / len(rows),
                "reasons": dict(Counter(why for *_, why in rows).most_common()),
                "diversity": {"all": diversity(text for text, *_ in rows), "kept": diversity(kept)}}
    return found


def write_report(folder: Folder, examples: int = 24) -> Path:
    """Writes `report.html` from what was selected; returns its path."""
    shards = folder.tables(SELECTED)
    scores = {name: {origin: np.concatenate([shard[name][shard["origin"] == origin] for shard in shards])
                     for origin in ORIGINS} for name in ("itm", "itc")}
    drawn = [(label, [name for name, each in scores[key].items() if len(each)],
              histogram({name: each for name, each in scores[key].items() if len(each)}, label))
             for key, label in (("itm", "probability that text and picture belong together"), ("itc", "cosine"))
             if any(np.isfinite(each).any() for each in scores[key].values())]
    manifest = folder.manifest
    return write_page(
        folder.path / "report.html", "capfilt/report.html.jinja", title=folder.path.resolve().name, kind="CapFilt",
        measured=measure(shards), reasons=REASONS, drawn=drawn, rule=manifest.get("rule", {}),
        least=manifest.get("least"), manifest=manifest, examples=list(_examples(folder, shards, examples)),
        named=[each for shard in shards for each in shard.examples][:20])


def _examples(folder: Folder, shards: Sequence[Texts], count: int) -> Iterable[tuple[np.ndarray, list[dict]]]:
    """Pictures of the web, spread over all, with their texts and what became of them."""
    web = [i for i, shard in enumerate(folder.shards) if shard.origin == "web"]
    places = [(i, record) for i in web for record in sorted(set(shards[i].columns["record"]))]
    for place in spread(len(places), count):
        i, record = places[place]
        columns = shards[i].columns
        rows = [{name: columns[name][j] for name in ("text", "origin", "itm", "itc", "kept", "why")}
                for j in np.flatnonzero(np.asarray(columns["record"]) == record)]
        image = decode(folder.shards[i].source[record]["image"])
        image.thumbnail((SIDE, SIDE))
        yield np.asarray(image), rows
