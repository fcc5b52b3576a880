"""Write the run report: one HTML file with the curves, the final metrics and held-out examples of a workdir."""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.evals.context import CaptionExample, PredictionExample, RetrievalExample
from jaxmm.pages import number, write_page

Example = RetrievalExample | PredictionExample | CaptionExample

Series = dict[str, list[tuple[int, float]]]
"""Metric name to (step, value) pairs by rising step; NaN where the run wrote null."""

# Placeholders in matplotlib's SVG for what the page's style sheet sets, so that dark mode reaches the curves.
_INK, _GRID = "#010101", "#020202"
_COLORS = [f"#03030{i}" for i in range(1, 7)]
_MAX_POINTS = 400
_MAX_PANELS = 24


def write_report(workdir: Path | str, examples: Iterable[Example] = ()) -> Path:
    """Write `report.html` from `config.json`, `metrics.jsonl` and the evaluators' `examples`; return its path."""
    workdir = Path(workdir)
    examples = list(examples)
    metrics = read_metrics(workdir / "metrics.jsonl")
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
        series = dict(list(series.items())[:len(_COLORS)])
        held_out = any(not name.startswith("train/") for name in series)
        drawn.append({"title": next(iter(series)).split("/", 1)[1] if len(series) == 1 else key,
                      "names": list(series), "svg": curves(series), "order": (key != "loss", not held_out)})
    return sorted(drawn, key=lambda panel: panel["order"])[:_MAX_PANELS]


def curves(series: Series) -> str:
    """Return an SVG of the curves, coloured by the page's style sheet; logarithmic if they span decades."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def draw(axes) -> None:
        finite = []
        for (_, points), color in zip(series.items(), _COLORS, strict=False):
            x, y = _thinned(points)
            axes.plot(x, y, color=color, linewidth=1.6, marker="o" if len(x) <= 30 else None, markersize=3.2)
            finite.extend(y[np.isfinite(y)])
        if min(finite) > 0 and max(finite) / min(finite) > 100 and not any("learning_rate" in n for n in series):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"))

    return drawing(draw, "curves over the steps")


def histogram(values: Mapping[str, np.ndarray], label: str) -> str:
    """Return an SVG of the distributions of `values` (numbers by name): shares in 40 equal bins."""
    from matplotlib.ticker import PercentFormatter

    finite = {name: numbers[np.isfinite(numbers)] for name, numbers in values.items()}
    every = np.concatenate([*finite.values(), np.zeros(0)])
    edges = np.linspace(every.min(initial=0.0), max(every.max(initial=0.0), 1e-6), 41)

    def draw(axes) -> None:
        for numbers, color in zip(finite.values(), _COLORS, strict=False):
            axes.stairs(np.histogram(numbers, edges)[0] / max(len(numbers), 1), edges, color=color, linewidth=1.6)
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return drawing(draw, f"distribution: {label}")


def drawing(draw: Callable[[Any], None], label: str) -> str:
    """Return an SVG of what `draw` draws, in the page's colours: `_COLORS` are placeholders for the legend's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK,
             "ytick.color": _INK, "axes.edgecolor": _GRID, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "jaxmm"}
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    for i, color in enumerate(_COLORS):
        svg = svg.replace(color, f"var(--c{i + 1})")
    return svg


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values; long curves as the means of neighbouring points."""
    x, y = np.array(points, float).T
    if len(x) <= _MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MAX_POINTS)
    means = [y[p][np.isfinite(y[p])].mean() if np.isfinite(y[p]).any() else math.nan for p in parts]
    return np.array([x[p].mean() for p in parts]), np.array(means)


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
        return ", ".join(map(_flat, value))
    return number(value) if isinstance(value, float) else str(value)



