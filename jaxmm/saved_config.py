"""How configurations are saved and read: plain JSON values with the type of each dataclass, also of older versions."""

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmm.atomic import write_atomically
from jaxmm.validation import ConfigError, require

RENAMED = {
    "jaxmm.models.med.MedConfig": "jaxmm.models.med_config.MedConfig",
    "jaxmm.capfilt.select.Rule": "jaxmm.capfilt.selection.Rule",
    "jaxmm.generate.Decoding": "jaxmm.inference.generate.Decoding",
    "jaxmm.tasks.blip.BLIPPretraining": "jaxmm.tasks.blip_pretraining.BLIPPretraining",
    "jaxmm.tasks.caption.Captioning": "jaxmm.tasks.image_captioning.Captioning",
    "jaxmm.tasks.classify.Classify": "jaxmm.tasks.image_classification.Classification",
    "jaxmm.tasks.contrastive.Contrastive": "jaxmm.tasks.contrastive_learning.ContrastiveLearning",
    "jaxmm.tasks.nlvr.NLVR": "jaxmm.tasks.pair_classification.PairClassification",
    "jaxmm.tasks.vqa.VQA": "jaxmm.tasks.question_answering.QuestionAnswering",
    "jaxmm.evals.classification.Classification": "jaxmm.evals.accuracy.TopKAccuracy",
    "jaxmm.evals.vqa.VQAAccuracy": "jaxmm.evals.vqa_accuracy.VQAAccuracy",
}
"""Current names of types in configurations that older versions wrote."""
RECIPE = "recipe_"
"""Prefix of the module names of imported recipe files."""


def to_dict(value: Any) -> Any:
    """Convert a configuration to plain JSON values; a dataclass becomes its fields and a `type`."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}"} | fields
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def from_dict(value: Any, file: Path | str | None = None) -> Any:
    """Return the configuration that `to_dict` wrote; `file`, where it was read, is named in messages.

    Only frozen dataclasses are built: jaxmm's own, and those of modules that are imported already. Nothing else is
    imported because a file says so. Raises `ConfigError` for other types and for unknown fields.
    """
    if isinstance(value, list):
        return tuple(from_dict(item, file) for item in value)
    if not isinstance(value, dict):
        return value
    cls = _find_type(value.get("type"), "" if file is None else f"{file}: ")
    fields = {name: from_dict(item, file) for name, item in value.items() if name != "type"}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ConfigError(f"{'' if file is None else f'{file}: '}{value['type']} has no field {sorted(unknown)}")
    return cls(**fields)


def _find_type(name: Any, where: str) -> type:
    """Return the frozen dataclass called `name`, such as "jaxmm.config.MeshConfig"."""
    module, _, attribute = RENAMED.get(str(name), str(name)).rpartition(".")
    if module.startswith("jaxmm."):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    elif module and module not in sys.modules:
        how = (f"load that recipe first: jaxmm.recipes.load_recipe(Path(\".../{module.removeprefix(RECIPE)}.py\"))"
               if module.startswith(RECIPE) else f"import {module} first")
        raise ConfigError(f"{where}type is {name!r}, and the module {module} is not imported; {how}")
    cls = getattr(sys.modules.get(module), attribute, None) if module else None
    usable = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    require(usable and cls.__module__ == module, f"{where}type", name,
            "a frozen dataclass at the top level of its module" + (
                "; run what defines it first" if module == "__main__" else ""))
    return cls


def save_config(config: Any, path: Path, **notes: Any) -> None:
    """Write `config` and `notes` (versions, devices) to `path` as JSON."""
    write_atomically(path, json.dumps({"config": to_dict(config)} | notes, indent=2) + "\n")


def with_current_names(value: Any) -> Any:
    """Replace the types that older versions wrote by their names of today, in plain JSON values."""
    return _with_types(value, RENAMED)


def with_new_fields(value: Any) -> Any:
    """Add the fields that an older version did not have, with their defaults, to plain JSON values."""
    if isinstance(value, list):
        return [with_new_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: with_new_fields(item) for key, item in value.items()}
    with contextlib.suppress(ConfigError):  # a type of a module that is not imported stays as it is
        for part in dataclasses.fields(_find_type(value.get("type"), "")):
            make = part.default_factory if part.default is dataclasses.MISSING else lambda part=part: part.default
            if part.name not in value and make is not dataclasses.MISSING:
                value[part.name] = to_dict(make())
    return value


def with_first_names(value: Any) -> Any:
    """Replace types by the names that the oldest version wrote, in plain JSON values, so that digests stay the same."""
    return _with_types(value, {new: old for old, new in reversed(RENAMED.items())})


def _with_types(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_with_types(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_types(item, names) for key, item in value.items()}
    return value | {"type": names.get(value["type"], value["type"])} if isinstance(value.get("type"), str) else value


def differences(old: Any, new: Any, *, free: Sequence[str] = (), name: str = "") -> list[str]:
    """List the differences between two JSON values, one line per field, except for the fields in `free`."""
    if name in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted(set(old) | set(new))
                for line in differences(old.get(key), new.get(key), free=free, name=f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]
