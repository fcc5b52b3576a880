"""Name the extra to install if an optional package is missing."""

import importlib.util

EXTRAS = {
    "train": ("jinja2", "matplotlib", "sklearn", "tensorboardX"),
    "captions": ("pycocoevalcap",),
    "buckets": ("gcsfs", "s3fs"),
    "serve": ("fastapi", "jinja2", "prometheus_client", "python_multipart", "uvicorn"),
    "parity": ("torch", "transformers"),
    "tpu": ("libtpu",),
}
"""Modules of each extra in pyproject.toml."""


class MissingExtra(ImportError):
    """A package is not installed; the message names the extra that has it."""


def has_extra(extra: str) -> bool:
    """Return whether every package of `extra` is installed."""
    return not _missing(extra)


def require_extra(extra: str, purpose: str) -> None:
    """Raise `MissingExtra` if a package of `extra` is not installed; `purpose` is a noun phrase: what needs it."""
    if missing := _missing(extra):
        raise MissingExtra(f"{purpose} needs {', '.join(missing)}; install the extra: pip install 'jaxmm[{extra}]'")


def _missing(extra: str) -> list[str]:
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
