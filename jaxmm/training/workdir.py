"""What a work folder says of the run that was begun in it, so that no other run goes on there."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from jaxmm.config import ConfigError, TrainConfig, differences, save_config, to_dict, with_current_names
from jaxmm.data.base import Source
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.task import Task
from jaxmm.validation import count_steps

FREE = ("steps", "microbatches", "log_every", "eval_every", "evals", "mesh", "checkpoint", "nonfinite", "max_skips",
        "data.val", "data.workers", "data.data_dir", "data.max_bad")
"""What may be changed when a run goes on; anything else would make it another run."""

SHARES = (("optimizer", "warmup"), ("optimizer", "cooldown"), ("task", "ramp"))
"""Fields that are a number of steps or a share of them."""


def begun(config: TrainConfig, workdir: Path, source: Source) -> dict[str, Any] | None:
    """What `config.json` says of the run in `workdir`; None where none was begun.

    Refuses to go on with a run that was begun with another configuration.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        notes = json.loads(path.read_text())
        old, fingerprint, _ = with_current_names(notes["config"]), notes["fingerprint"], notes["task"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not what a run writes: {type(error).__name__}: {error}") from None
    new = json.loads(json.dumps(to_dict(config)))
    for part, field in SHARES:
        values = [side.get(part, {}).get(field) for side in (old, new)]
        if None not in values and len({count_steps(value, old.get("steps", config.steps)) for value in values}) == 1:
            old[part][field] = new[part][field]
    changes = differences(old, new, free=FREE)
    if fingerprint != source.fingerprint:
        changes.append(f"data.train is {config.data.train!r} as before, but lists other records")
    if changes:
        raise ConfigError(f"workdir is {str(workdir)!r}, which holds a run with another configuration; "
                          "wanted the same, or another folder:\n  " + "\n  ".join(changes))
    return notes


def begin(config: TrainConfig, task: Task, workdir: Path, source: Source, tokenizer: Tokenizer | None) -> None:
    """Writes `tokenizer/` and `config.json`: the recipe, the bound `task`, versions, devices."""
    if tokenizer is not None and not (workdir / "tokenizer").exists():
        part = workdir / "tokenizer.part"
        tokenizer.save(part)
        part.rename(workdir / "tokenizer")
    packages = ("jaxmm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    devices, part = jax.devices(), workdir / "config.json.part"
    save_config(config, part, task=to_dict(task), classes=to_dict(source.classes),
                fingerprint=source.fingerprint,
                versions={name: importlib.metadata.version(name) for name in packages}
                | {"python": platform.python_version()},
                devices=f"{len(devices)} x {devices[0].device_kind}", hosts=jax.process_count())
    part.replace(workdir / "config.json")
