"""Rows of the parts that all families share: a stack of layers, norms, projections, attention pooling."""

from collections.abc import Mapping

from jaxmm.pretrained.io.files import Tensors
from jaxmm.pretrained.table import FLAT, SAME, TRANSPOSED, Row, linear

PARTS = ("query", "key", "value")


def depth(tensors: Tensors, prefix: str) -> int:
    """Count the layers whose names begin with `prefix` and a number."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix))


def norm(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a torch layer norm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def dense(ours: str, theirs: str, *, bias: bool = True) -> list[Row]:
    """Return the rows of a torch linear layer."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED)] + ([Row(f"{ours}/bias", f"{theirs}.bias")]
                                                                      if bias else [])


def projections(ours: str, theirs: Mapping[str, str]) -> list[Row]:
    """Return the rows of query, key and value as separate linear layers."""
    return [row for name in PARTS for row in (Row(f"{ours}/{name}/kernel", f"{theirs[name]}.weight", linear()),
                                              Row(f"{ours}/{name}/bias", f"{theirs[name]}.bias", FLAT))]


def packed(ours: str, weight: str, bias: str) -> list[Row]:
    """Return the rows of query, key and value as one linear layer, whose outputs follow each other."""
    return [row for part, name in enumerate(PARTS) for row in (
        Row(f"{ours}/{name}/kernel", weight, linear(), part, 3), Row(f"{ours}/{name}/bias", bias, FLAT, part, 3))]


def out(ours: str, theirs: str) -> list[Row]:
    """Return the rows of attention's last projection, whose kernel is [h k d]."""
    return [Row(f"{ours}/out/kernel", f"{theirs}.weight", linear(2)), Row(f"{ours}/out/bias", f"{theirs}.bias")]


def layers(
    ours: str, theirs: str, *, attention: Mapping[str, str] | tuple[str, str], out_name: str, mlp: tuple[str, str],
    norms: tuple[str, str],
) -> list[Row]:
    """Return the rows of a stack of layers; `theirs` is the prefix of a layer's keys, with `{}` for its number.

    `attention` names query, key and value, or the weight and the bias of all three in one.
    """
    block = f"{ours}/blocks" if ours else "blocks"
    if isinstance(attention, tuple):
        rows = packed(f"{block}/attention", *(f"{theirs}.{name}" for name in attention))
    else:
        rows = projections(f"{block}/attention", {name: f"{theirs}.{key}" for name, key in attention.items()})
    return [*rows, *out(f"{block}/attention", f"{theirs}.{out_name}"),
            *norm(f"{block}/attention_norm", f"{theirs}.{norms[0]}"),
            *norm(f"{block}/mlp_norm", f"{theirs}.{norms[1]}"),
            *dense(f"{block}/mlp/up", f"{theirs}.{mlp[0]}"), *dense(f"{block}/mlp/down", f"{theirs}.{mlp[1]}")]


def torch_map_head(ours: str, theirs: str, *, norm_name: str = "layernorm") -> list[Row]:
    """Return the rows of attention pooling with `torch.nn.MultiheadAttention` (SigLIP in transformers)."""
    attention = f"{theirs}.attention"
    return [Row(f"{ours}/probe", f"{theirs}.probe", SAME),
            *packed(f"{ours}/attention", f"{attention}.in_proj_weight", f"{attention}.in_proj_bias"),
            *out(f"{ours}/attention", f"{attention}.out_proj"), *norm(f"{ours}/mlp_norm", f"{theirs}.{norm_name}"),
            *dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"), *dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")]
