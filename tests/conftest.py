"""Eight CPU devices, annotations checked at every call, and compiled programs kept from one run to the next."""

import os
import stat
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook names it but does not import it)
from tests.xla import flags

os.environ["JAX_PLATFORMS"] = "cpu"
PROCESSES = ("test_hosts", "test_resume", "test_stages", "test_processes")
"""Files whose tests start processes."""


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


def pytest_collection_modifyitems(items):
    """Puts tests that start processes first: they wait, and whichever worker is left with them ends last."""
    items.sort(key=lambda item: not item.path.stem.startswith(PROCESSES))


def pytest_terminal_summary(terminalreporter):
    """Shows the figures that tests hand to `record_property`, also those of tests that passed."""
    figures = [figure for report in terminalreporter.getreports("passed") for figure in report.user_properties]
    if figures:
        terminalreporter.section("figures")
    for name, figure in figures:
        terminalreporter.write_line(f"{name}: {figure}")


install_import_hook("jaxmm", "tests.typecheck.typechecked")


@pytest.fixture(scope="session", autouse=True)
def _undrawn():
    """Leave the curves out of reports: to draw them takes longer than most of the runs that they show."""
    from matplotlib.figure import Figure

    draw = Figure.savefig
    Figure.savefig = lambda figure, out, **_: out.write("<svg></svg>")
    yield draw
    Figure.savefig = draw


@pytest.fixture
def drawings(_undrawn, monkeypatch):
    """Draw the curves of reports all the same."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _undrawn)


@pytest.fixture(scope="session")
def _cache_home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache-home")
    if programs := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        (folder / "jaxmm").mkdir()
        (folder / "jaxmm" / "xla").symlink_to(programs)
    return folder


@pytest.fixture
def user_cache(_cache_home, monkeypatch):
    """A user's cache that all commands of a session share; its compiled programs are those of the tests."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(_cache_home))
    yield _cache_home
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def no_java(monkeypatch):
    """METEOR would start a Java machine an evaluation."""
    from jaxmm.evals import caption_metrics

    for module in ("caption_metrics", "captions"):
        monkeypatch.setattr(f"jaxmm.evals.{module}.caption_metric_names", lambda: caption_metrics.METRICS)
