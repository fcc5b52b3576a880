"""Rows of a table, and an HTML page, of the results of `jaxmm eval`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmm.data.base import Source
from jaxmm.evals.context import thumbnail
from jaxmm.evals.published_scores import published_score
from jaxmm.pages import write_page

COLUMNS = ("metric", "value", "95 %", "published")
WORST = 12
"""Classes that the page names, those with the lowest accuracy."""


def metric_rows(row: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the cells of `COLUMNS` for every metric of a result."""
    ours = row["jaxmm"]
    for name, value in ours["metrics"].items():
        low_high = ours["intervals"].get(name)
        score = published_score(row["pretrained"], ours["source"], name)
        yield (name, f"{value:.4f}", f"{low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else "",
               f"{score.value:.4f} ({score.source})" if score else "")


def write_evaluation(path: Path, results: Sequence[tuple[dict[str, Any], Source]]) -> Path:
    """Write one page with the metrics, the worst classes and the mistakes of all results; return its path."""
    sections = []
    for row, source in results:
        ours = row["jaxmm"]
        mistakes = [{**mistake, "image": thumbnail(source, mistake["record"])} for mistake in ours["mistakes"]]
        worst = sorted(ours["per_class"].items(), key=lambda item: item[1])[:WORST]
        sections.append({"model": row["pretrained"], "source": ours["source"], "evaluator": ours["evaluator"],
                         "records": ours["records"], "rows": list(metric_rows(row)), "worst": worst,
                         "mistakes": mistakes})
    return write_page(path, "evaluation.html.jinja", title="Evaluation", kind="jaxmm eval", columns=COLUMNS,
                      sections=sections)
