"""Record what a folder is made from, so that two runs are never mixed in it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmm.atomic import write_atomically
from jaxmm.capfilt.tables import digest
from jaxmm.inference.model import Model
from jaxmm.saved_config import differences, to_dict, with_current_names, with_first_names, with_new_fields
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError

NAME = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts recorded so far; {} before the first stage. Raise `ConfigError` if they cannot be read."""
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not what CapFilt writes: {error}") from None


def record_facts(folder: Path, free: tuple[str, ...] = (), **facts: Any) -> dict[str, Any]:
    """Add `facts` to the manifest and return all of it.

    Raise `ConfigError` if a fact differs from the recorded one and is not in `free`.
    """
    known = with_first_names(with_new_fields(with_current_names(read_manifest(folder))))
    facts = json.loads(json.dumps(facts))
    changed = differences({name: value for name, value in known.items() if name in facts},
                          {name: value for name, value in facts.items() if name in known}, free=free)
    if changed:
        raise ConfigError(f"out is {str(folder)!r}, which holds a run of something else; expected the same, or another "
                          "folder:\n  " + "\n  ".join(changed))
    if jax.process_index() == 0 and known | facts != known:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / NAME, json.dumps(known | facts, indent=2) + "\n")
    return known | facts


def plain(config: Any) -> Any:
    """Return a configuration as JSON values that stay the same in later versions."""
    return with_first_names(to_dict(config))


def model_digest(model: Model) -> str:
    """Return the digest of everything that determines a model's outputs: task, parameters, preprocessing, tokenizer."""
    parts = [plain(model.task), plain(model.preprocessing)]
    if model.tokenizer is not None:
        parts.append(model.tokenizer.fingerprint)
    for name, leaf in named_leaves(model.params):
        value = np.asarray(leaf)
        parts.append([name, str(value.dtype), list(value.shape), _bytes_digest(value)])
    return digest(*parts)


def _bytes_digest(value: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(value).view(np.uint8), digest_size=16).hexdigest()
