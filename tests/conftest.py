"""Eight CPU devices, annotations checked at every call, and compiled programs kept from one run to the next."""

import os
import stat
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook names it but does not import it)
from tests.xla import flags

os.environ["JAX_PLATFORMS"] = "cpu"


def _private_cache() -> Path | None:
    """A folder that nobody else can write, or None: who writes there runs code here."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmm" / "xla-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return folder if ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (cache := _private_cache()):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_configure(config):
    """Parity is that of programs as users compile them."""
    wanted = flags(8, fast=config.option.markexpr != "parity")
    if wanted not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {wanted}".strip()


def pytest_terminal_summary(terminalreporter):
    """Shows the figures that tests hand to `record_property`, also those of tests that passed."""
    figures = [figure for report in terminalreporter.getreports("passed") for figure in report.user_properties]
    if figures:
        terminalreporter.section("figures")
    for name, figure in figures:
        terminalreporter.write_line(f"{name}: {figure}")


install_import_hook("jaxmm", "tests.typecheck.typechecked")


@pytest.fixture
def no_java(monkeypatch):
    """METEOR would start a Java machine an evaluation."""
    from jaxmm.evals import caption_metrics

    for module in ("caption_metrics", "captions"):
        monkeypatch.setattr(f"jaxmm.evals.{module}.caption_metric_names", lambda: caption_metrics.METRICS)
