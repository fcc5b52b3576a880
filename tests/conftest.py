"""Eight CPU devices, annotations checked at every call, and compiled programs kept from one run to the next."""

import os
import re
import stat
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook names it but does not import it)
from tests.xla import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
STRICT_DTYPES = ("losses", "models", "nn", "tasks")
"""Folders whose tests refuse implicit promotion of dtypes: what these import computes nothing with it."""
PROCESSES = ("test_hosts", "test_resume", "test_stages", "test_processes", "test_worker_faults")
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
    for item in items:
        if item.get_closest_marker("parity"):                       # the published libraries warn of their own
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_terminal_summary(terminalreporter):
    """Shows the figures that tests hand to `record_property`, also those of tests that passed."""
    figures = [figure for report in terminalreporter.getreports("passed") for figure in report.user_properties]
    if figures:
        terminalreporter.section("figures")
    for name, figure in figures:
        terminalreporter.write_line(f"{name}: {figure}")


install_import_hook("jaxmm", "tests.typecheck.typechecked")


@pytest.fixture(autouse=True)
def _strict_dtypes(request):
    """Refuse implicit promotion of dtypes, except where Flax's or optax's own code promotes them."""
    import jax

    strict = request.path.parent.name in STRICT_DTYPES and "standard_promotion" not in request.keywords
    ranks = "allow" if request.node.get_closest_marker("parity") else "raise"
    with jax.numpy_dtype_promotion("strict" if strict else "standard"), jax.numpy_rank_promotion(ranks):
        yield


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
def scenes(tmp_path_factory):
    """The folder of a data set of small scenes."""
    from jaxmm.data.sources.registry import open_source

    folder = tmp_path_factory.mktemp("scenes")
    open_source("scenes:tiny/train", data_dir=str(folder))
    return folder


@pytest.fixture(scope="session")
def gcs_proxy(tmp_path_factory):
    """A proxy in front of a server of `gs://`, which the environment names for the rest of the session."""
    from tests.bucket_servers import Proxy, gcs_environment, gcs_server

    proxy = Proxy()
    with gcs_server(proxy.port) as proxy.target, pytest.MonkeyPatch.context() as patch:
        for name, value in gcs_environment(proxy.port).items():
            patch.setenv(name, value)
        patch.setenv("JAXMM_BUCKET_TIMEOUT", "5")
        yield proxy
        proxy.close()


def slug(request):
    """A name for a folder of a test."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def gcs(gcs_proxy, request):
    """A new folder `gs://...` on a real server."""
    from tests.bucket_servers import BUCKET

    return f"gs://{BUCKET}/{slug(request)}"


@pytest.fixture(scope="session")
def s3_proxy():
    """A proxy in front of a server of `s3://`, which the environment names for the rest of the session."""
    from tests.bucket_servers import S3_KEYS, Proxy, s3_server

    proxy = Proxy()
    with s3_server() as proxy.target, pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", **S3_KEYS}.items():
            patch.setenv(name, value)
        yield proxy
        proxy.close()


@pytest.fixture
def s3(s3_proxy, request):
    """A new folder `s3://...` on a real server."""
    from tests.bucket_servers import BUCKET

    return f"s3://{BUCKET}/{slug(request)}"


@pytest.fixture
def bucket_cache(tmp_path, monkeypatch):
    """An empty cache of the parts of objects."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxmm" / "buckets"


@pytest.fixture(scope="session")
def shared_programs():
    """Let the runs of a session share steps and first states: each task, optimizer and mesh is traced once."""
    import jax
    import numpy as np

    from jaxmm.sharding import named_leaves
    from jaxmm.training import loop, setup
    from jaxmm.training import step as steps_module

    optimizers, shapes, states, steps = {}, {}, {}, {}
    make_optimizer, abstract_state, sharded_state, compile_step = (
        setup.make_optimizer, setup.abstract_state, loop.sharded_state, loop.compile_step)

    def layout(tree):
        return tuple((path, leaf.shape, leaf.dtype, leaf.sharding) for path, leaf in named_leaves(tree))

    def shared(made, key, make):
        if key not in made:
            made[key] = make()
        return made[key]

    def optimizer(config, params, total, bounds=()):
        return shared(optimizers, (config, layout(params), total, bounds),
                      lambda: make_optimizer(config, params, total, bounds))

    def shape(task, optimizer):
        return shared(shapes, (task, id(optimizer)), lambda: abstract_state(task, optimizer))

    def state(task, optimizer, seed, like, given=None):
        if given:
            return sharded_state(task, optimizer, seed, like, given)
        first = shared(states, (task, id(optimizer), seed, layout(like)), lambda: jax.tree.map(
            np.asarray, sharded_state(task, optimizer, seed, like)))
        return jax.tree.map(lambda leaf, place: jax.device_put(leaf, place.sharding), first, like)

    def traced_once(program):
        traces, train_step = [], steps_module.train_step

        def counted(*args, **options):
            inputs = str(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), args[2:]))
            assert inputs not in traces, "the step was traced again for arrays of the same shapes"
            traces.append(inputs)
            return train_step(*args, **options)

        def run(*inputs):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(steps_module, "train_step", counted)
                return program(*inputs)

        return run

    def step(task, optimizer, mesh, like, **options):
        return shared(steps, (task, id(optimizer), mesh, layout(like), tuple(options.items())),
                      lambda: traced_once(compile_step(task, optimizer, mesh, like, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_optimizer", optimizer)
        patch.setattr(setup, "abstract_state", shape)
        patch.setattr(loop, "sharded_state", state)
        patch.setattr(loop, "compile_step", step)
        yield


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
