"""Runs of the same task share what is compiled for them."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _shared(shared_programs):
    """For every test of this folder."""
