"""Runs of the same task share what is compiled for them, and none moves data unasked."""

import jax
import pytest

from jaxmm.training import loop
from tests.training.process import run


@pytest.fixture(scope="session", autouse=True)
def _shared(shared_programs):
    """For every test of this folder."""


@pytest.fixture(scope="session")
def undisturbed(scenes, tmp_path_factory):
    """The workdir of an undisturbed run of `tests.training.process`."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, scenes)
    return workdir


@pytest.fixture(scope="session", autouse=True)
def _guarded():
    """No loop of this folder's runs moves anything between host and devices unless its code says so."""
    train_steps = loop.Run.train_steps

    def guarded(run):
        with jax.transfer_guard("disallow"):
            return train_steps(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "train_steps", guarded)
        yield
