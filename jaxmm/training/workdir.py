"""Lock a workdir, and record which run it holds, so that no other run continues there."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxmm.config import TrainConfig
from jaxmm.data.base import Source
from jaxmm.data.tokenizers import SETTINGS, Tokenizer
from jaxmm.folder_locks import FolderInUse, lock_folder
from jaxmm.paths import new_folder
from jaxmm.saved_config import differences, save_config, to_dict, with_current_names, with_new_fields
from jaxmm.task import Task
from jaxmm.validation import ConfigError, count_steps

FREE = ("steps", "microbatches", "log_every", "eval_every", "evals", "mesh", "checkpoint", "nonfinite", "max_skips",
        "data.val", "data.workers", "data.data_dir", "data.max_bad")
"""Fields that may change when a run continues; anything else would make it another run."""

SHARES = (("optimizer", "warmup"), ("optimizer", "cooldown"), ("task", "ramp"))
"""Fields that are a number of steps or a share of them."""


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Make `workdir` and, on the first host, lock it. Raises `ConfigError` if it cannot be written or is in use."""
    with contextlib.ExitStack() as locked:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                locked.enter_context(lock_folder(workdir))
        except FolderInUse:
            raise ConfigError(f"workdir is {str(workdir)!r}, which another run is writing to") from None
        except OSError as error:
            raise ConfigError(f"workdir is {str(workdir)!r}, which cannot be written: {error}") from None
        yield


def read_run_config(config: TrainConfig, workdir: Path, source: Source) -> dict[str, Any] | None:
    """Return the contents of `config.json` in `workdir`; None if there is none.

    Raises `ConfigError` if the run there has another configuration.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        notes = json.loads(path.read_text())
        old, fingerprint, _ = with_new_fields(with_current_names(notes["config"])), notes["fingerprint"], notes["task"]
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
                          "expected the same, or another folder:\n  " + "\n  ".join(changes))
    return notes


def write_run_config(
    config: TrainConfig, task: Task, workdir: Path, source: Source, tokenizer: Tokenizer | None
) -> None:
    """Write `tokenizer/` and `config.json`: the recipe, the bound `task`, versions, devices."""
    if tokenizer is not None and not (workdir / "tokenizer" / SETTINGS).exists():
        with new_folder(workdir / "tokenizer", last=SETTINGS) as folder:
            tokenizer.save(folder)
    packages = ("jaxmm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    devices = jax.devices()
    save_config(config, workdir / "config.json", task=to_dict(task), classes=to_dict(source.classes),
                fingerprint=source.fingerprint,
                versions={name: importlib.metadata.version(name) for name in packages}
                | {"python": platform.python_version()},
                devices=f"{len(devices)} x {devices[0].device_kind}", hosts=jax.process_count())
