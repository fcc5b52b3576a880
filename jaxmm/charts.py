"""Charts for HTML pages: Matplotlib's drawings as SVG in the colours of the page, so that dark mode reaches them."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Names of curves to their points (x, y) by rising x; NaN leaves a gap."""

INK, GRID = "#010101", "#020202"
"""Placeholders for what the page's style sheet sets: text and lines."""
COLORS = [f"#03030{i}" for i in range(1, 7)]
"""Placeholders for the colours of a legend, `var(--c1)` to `var(--c6)`."""
MAX_POINTS = 400
"""Most points of a curve."""


def curves(series: Series, x: str = "step") -> str:
    """Return an SVG of the curves over `x`, coloured by the page's style sheet; logarithmic if they span decades."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def draw(axes) -> None:
        finite = []
        for (_, points), color in zip(series.items(), COLORS, strict=False):
            at, y = _thinned(points)
            axes.plot(at, y, color=color, linewidth=1.6, marker="o" if len(at) <= 30 else None, markersize=3.2)
            finite.extend(y[np.isfinite(y)])
        if min(finite) > 0 and max(finite) / min(finite) > 100 and not any("learning_rate" in n for n in series):
            axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"))

    return drawing(draw, f"curves over the {x}s")


def histogram(values: Mapping[str, np.ndarray], label: str) -> str:
    """Return an SVG of the distributions of `values` (numbers by name): shares in 40 equal bins."""
    from matplotlib.ticker import PercentFormatter

    finite = {name: numbers[np.isfinite(numbers)] for name, numbers in values.items()}
    every = np.concatenate([*finite.values(), np.zeros(0)])
    edges = np.linspace(every.min(initial=0.0), max(every.max(initial=0.0), 1e-6), 41)

    def draw(axes) -> None:
        for numbers, color in zip(finite.values(), COLORS, strict=False):
            axes.stairs(np.histogram(numbers, edges)[0] / max(len(numbers), 1), edges, color=color, linewidth=1.6)
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return drawing(draw, f"distribution: {label}")


def drawing(draw: Callable[[Any], None], label: str, size: tuple[float, float] = (4.6, 2.3)) -> str:
    """Return an SVG of what `draw` draws on Matplotlib's axes, of `size` in inches.

    `INK`, `GRID` and `COLORS` become the page's colours, the last ones those of the legend.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
             "ytick.color": INK, "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "jaxmm"}
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{label}"', svg, count=1)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{i + 1})")
    return svg


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values; long curves as the means of neighbouring points."""
    x, y = np.array(points, float).T
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    means = [y[p][np.isfinite(y[p])].mean() if np.isfinite(y[p]).any() else math.nan for p in parts]
    return np.array([x[p].mean() for p in parts]), np.array(means)
