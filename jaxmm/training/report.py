"""Write the run report: one HTML file with the curves, the final metrics and held-out examples of a workdir."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmm.charts import COLORS, curves
from jaxmm.evals.context import FIGURE, CaptionExample, Drawing, ImageGrid, PredictionExample, RetrievalExample
from jaxmm.pages import number, write_page
from jaxmm.paths import user_path

Example = RetrievalExample | PredictionExample | CaptionExample | ImageGrid | Drawing

Series = dict[str, list[tuple[int, float]]]
"""Metric name to (step, value) pairs by rising step; NaN where the run wrote null."""
_MAX_PANELS, _MAX_VALUES = 24, 40


def write_report(workdir: Path | str, examples: Iterable[Example] = ()) -> Path:
    """Write `report.html` from `config.json`, `metrics.jsonl` and the evaluators' `examples`; return its path."""
    workdir = user_path(workdir, "workdir")
    examples = list(examples)
    metrics = {name: points for name, points in read_metrics(workdir / "metrics.jsonl").items()
               if not name.startswith(FIGURE)}
    notes = json.loads((workdir / "config.json").read_text()) if (workdir / "config.json").exists() else {}
    queries = [e for e in examples if isinstance(e, RetrievalExample)]
    return write_page(
        workdir / "report.html", "report.html.jinja", title=workdir.resolve().name, kind="run report",
        summary=summary(notes),
        config=json.dumps(notes.get("config", {}), indent=2),
        final=final_values(metrics),
        last_step=max((points[-1][0] for points in metrics.values()), default=None),
        panels=panels(metrics),
        image_queries=[e for e in queries if not isinstance(e.query, str)],
        text_queries=[e for e in queries if isinstance(e.query, str)],
        predictions=[e for e in examples if isinstance(e, PredictionExample)],
        captions=[e for e in examples if isinstance(e, CaptionExample)],
        grids=[e for e in examples if isinstance(e, ImageGrid)],
        drawings=[e for e in examples if isinstance(e, Drawing)],
    )


def read_metrics(path: Path) -> Series:
    """Return the curves of a `metrics.jsonl`; of a step written twice (a resumed run) the later line counts.

    A line that a kill cut short is skipped.
    """
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in entry.items():
            if "/" in name and (value is None or type(value) in (int, float)):
                curves.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def final_values(metrics: Series) -> list[dict[str, Any]]:
    """Return name, last value, and best value with its step of every metric, the held-out ones first."""
    rows = []
    for name, points in metrics.items():
        train = name.startswith(("train/", "data/"))
        lower = re.search(r"(loss|error|perplexity)$", name) is not None
        finite = [(value, step) for step, value in points if math.isfinite(value)]
        best = (min if lower else max)(finite, key=lambda p: p[0]) if len(finite) > 1 and not train else None
        rows.append({"name": name, "value": points[-1][1], "step": points[-1][0], "train": train, "best": best})
    return sorted(rows, key=lambda row: row["train"])


def panels(metrics: Series) -> list[dict[str, Any]]:
    """Draw one SVG per group of curves, such as `train/loss` and `val/loss`, or `val/top1` and `val/top5`."""
    groups: dict[str, Series] = {}
    for name, points in metrics.items():
        key = re.sub(r"@?\d+$", "", name.split("/", 1)[1])
        groups.setdefault(key, {})[name] = points
    drawn = []
    for key, series in groups.items():
        values = [[v for _, v in points if math.isfinite(v)] for points in series.values()]
        if max(map(len, values)) < 2 or not any(map(any, values)):
            continue                                           # a single point or only zeros says nothing as a curve
        series = dict(list(series.items())[:len(COLORS)])
        held_out = any(not name.startswith("train/") for name in series)
        drawn.append({"title": next(iter(series)).split("/", 1)[1] if len(series) == 1 else key,
                      "names": list(series), "svg": curves(series), "order": (key != "loss", not held_out)})
    return sorted(drawn, key=lambda panel: panel["order"])[:_MAX_PANELS]


def summary(notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) rows about the run from the contents of `config.json`."""
    config = notes.get("config", {})
    data, optimizer = config.get("data", {}), config.get("optimizer", {})
    rows = list(_parts("task", config.get("task")))
    rows.append(("data", " · ".join(f"{k} {data[k]}" for k in ("train", "val") if data.get(k))))
    if "steps" in config and "batch_size" in data:
        total = config["steps"] * data["batch_size"]
        size = data.get("image", {}).get("size")
        rows.append(("length", f"{config['steps']:,} steps × {data['batch_size']:,} images = {total:,} images"
                     + (f", {size} × {size} pixels" if size else "")))
    names = ("name", "learning_rate", "schedule", "warmup", "weight_decay", "average")
    rows.append(("optimizer", " · ".join(f"{k.replace('_', ' ')} {optimizer[k]}".removeprefix("name ")
                                         for k in names if optimizer.get(k))))
    rows.extend((k, _flat(config[k])) for k in ("mesh", "seed", "microbatches") if k in config)
    rows.extend((k, _flat(v)) for k, v in notes.items() if k != "config")
    return [(name, text) for name, text in rows if text]


def _parts(name: str, value: Any) -> Iterable[tuple[str, str]]:
    """Yield one row for a dataclass written by `to_dict`, and for each dataclass in its fields."""
    if not isinstance(value, dict):
        return
    kind = str(value.get("type", "")).rpartition(".")[2]
    plain = {k: v for k, v in value.items() if k != "type" and not isinstance(v, dict)}
    yield name, " · ".join(filter(None, [kind, _flat(plain)]))
    for key, inner in value.items():
        yield from _parts(f"{name}.{key}", inner)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        items = {k: v for k, v in value.items() if k != "type" and v is not None and v != []}
        return " · ".join(f"{k.replace('_', ' ')} {_flat(v)}" for k, v in items.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value)) if len(value) <= _MAX_VALUES else f"{len(value)} values"
    return number(value) if isinstance(value, float) else str(value)



