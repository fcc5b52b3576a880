"""Class names and templates of the usual benchmarks, from an installed clip-benchmark or open_clip.

Only data files of these packages are read; neither they nor PyTorch are imported.
"""

import importlib.util
import json
import runpy
from pathlib import Path
from typing import NamedTuple

from jaxmm.validation import ConfigError

INSTALL = "pip install --no-deps clip-benchmark"


class NamedPrompts(NamedTuple):
    """The names of a data set's classes (None: not known), and its templates, with `{}` in the place of the name."""

    classes: tuple[str, ...] | None
    templates: tuple[str, ...]


def named_prompts(name: str) -> NamedPrompts:
    """Return what clip-benchmark, or for `imagenet1k` open_clip, has for the data set `name`. Raises `ConfigError`."""
    known: list[str] = []
    if folder := _package("clip_benchmark"):
        classes, templates = (json.loads((folder / "datasets" / f"en_{file}.json").read_text(encoding="utf-8"))
                              for file in ("classnames", "zeroshot_classification_templates"))
        known = sorted(templates)
        if name in templates:
            return NamedPrompts(tuple(classes[name]) if name in classes else None,
                                tuple(template.replace("{c}", "{}") for template in templates[name]))
    elif folder := _package("open_clip"):
        known = ["imagenet1k"]
        if name in known:
            data = runpy.run_path(str(folder / "zero_shot_metadata.py"))
            return NamedPrompts(tuple(data["IMAGENET_CLASSNAMES"]),
                                tuple(template("{}") for template in data["OPENAI_IMAGENET_TEMPLATES"]))
    expected = f"one of {', '.join(known)}" if known else "an installed clip-benchmark"
    raise ConfigError(f"prompts is {name!r}; expected {expected} ({INSTALL})")


def _package(name: str) -> Path | None:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
