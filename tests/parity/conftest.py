"""Comparisons with published implementations are collected where the `parity` extra is installed."""

import importlib.util

from benchmarks.measure import import_torch

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

if not collect_ignore_glob:
    # timm and open_clip import torchvision, which beside a CPU build of torch lacks its compiled operators.
    import_torch()
