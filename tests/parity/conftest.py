"""Comparisons with published implementations are collected where the `parity` extra is installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

if not collect_ignore_glob and importlib.util.find_spec("torchvision"):
    # timm and open_clip import torchvision, which beside a CPU build of torch lacks its compiled operators. Nothing
    # here calls them; declared, they let it import.
    import torch

    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
