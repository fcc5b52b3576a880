"""Comparisons with published implementations are collected where the `parity` extra is installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
