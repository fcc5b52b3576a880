"""BLEU, ROUGE-L, CIDEr, METEOR and SPICE of captions, by COCO's published tools (`pycocoevalcap`)."""

import logging
import re
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from jaxmm.evals.ptb import ptb_tokens
from jaxmm.optional import has_extra

log = logging.getLogger(__name__)

METRICS = ("bleu@1", "bleu@2", "bleu@3", "bleu@4", "rouge_l", "cider")
"""Metrics that need no Java; `meteor` and `spice` do."""
NEWEST_JAVA = 15
"""Newest Java version that can run SPICE: later ones forbid access to their internal classes."""


@lru_cache(maxsize=1)
def caption_metric_names() -> tuple[str, ...]:
    """Return the metrics that can be measured here; warn once about those that cannot."""
    if not has_extra("captions"):
        log.warning("BLEU, ROUGE-L, CIDEr, METEOR and SPICE of captions are left out: pycocoevalcap is not installed; "
                    "pip install 'jaxmm[captions]'")
        return ()
    reasons = {"meteor": None, "spice": None}
    version = java_version()
    if version is None:
        reasons = dict.fromkeys(reasons, "no `java` that runs was found")
    elif version > NEWEST_JAVA:
        reasons["spice"] = f"it runs on Java 8 to {NEWEST_JAVA}, this is Java {version}"
    elif not _spice_parser():
        reasons["spice"] = "its parser is missing; `python -m pycocoevalcap.spice.get_stanford_models` fetches it"
    for name, reason in reasons.items():
        if reason is not None:
            log.warning("%s of captions is left out: %s", name.upper(), reason)
    return METRICS + tuple(name for name, reason in reasons.items() if reason is None)


def java_version() -> int | None:
    """Return the major version of the `java` on the path; None if there is none that runs."""
    try:
        banner = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True, timeout=60).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', banner)
    return int(version[1]) if version else None


def _spice_parser() -> bool:
    spec = find_spec("pycocoevalcap")
    return all((Path(folder) / "spice" / "lib" / f"stanford-corenlp-3.6.0{end}.jar").is_file()
               for folder in spec.submodule_search_locations for end in ("", "-models"))


def caption_metrics(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the metrics named by `caption_metric_names`, of one caption per image and all of its references.

    References without words and images without references do not count; values are NaN if no image counts. CIDEr is at
    most 10 and weighs words by how rare they are among these images: for a single image it is 0.
    """
    names = caption_metric_names()
    if not names:
        return {}
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth, guess = {}, {}
    for i, (text, texts) in enumerate(zip(written, references, strict=True)):
        if lines := [line for line in map(_line, texts) if line]:
            truth[i], guess[i] = lines, [_line(text)]
    if not truth:
        return dict.fromkeys(names, float("nan"))
    values = [*Bleu(4).compute_score(truth, guess, verbose=0)[0], Rouge().compute_score(truth, guess)[0],
              Cider().compute_score(truth, guess)[0]]
    if "meteor" in names:
        values.append(_meteor(truth, guess))
    if "spice" in names:
        from pycocoevalcap.spice.spice import Spice

        values.append(Spice().compute_score(truth, guess)[0])
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _line(text: str) -> str:
    return " ".join(ptb_tokens(text))


def _meteor(truth: dict[int, list[str]], guess: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor().compute_score(truth, guess)[0]
