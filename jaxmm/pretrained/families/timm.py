"""timm's plain ViT and DeiT, and the image towers of CLIP and SigLIP."""

import math
import re
from collections.abc import Mapping
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained import layers
from jaxmm.pretrained.family import Checkpoint, Export, Family, differing, known, unsupported
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, norm
from jaxmm.pretrained.table import CONV, FLAT, Row, lead, linear
from jaxmm.task import Task
from jaxmm.tasks.image_classification import Classification

ARCHITECTURE = re.compile(r"(?P<kind>vit|deit|deit3)_(?P<size>\w+?)(?P<distilled>_distilled)?_patch(?P<patch>\d+)"
                          r"(?P<tower>_clip|_clip_quickgelu|_siglip)?(?P<gap>_gap)?_(?P<side>\d+)")
HEADS = {"tiny": 3, "xsmall": 6, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16,
         "gigantic": 16, "so400m": 16, "giantopt": 16}
"""Attention heads, the only size that the weights do not show; `model_args.num_heads` has precedence."""
TANH = re.compile(r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip\w*|vit_large_patch16_siglip(_gap)?_512")
"""Names of the SigLIP towers that timm computes with the tanh approximation of GELU, as all were trained."""
POOLS = {"token": "cls", "avg": "gap", "map": "map"}


def read(config: Mapping[str, Any], tensors: Tensors) -> Checkpoint:
    """Describe timm's `config.json` with its weights. Raises `FileError` for what is not supported."""
    name = config["architecture"]
    match = ARCHITECTURE.fullmatch(name)
    if not match or match["size"] not in HEADS or match["kind"] == "deit3":
        raise FileError(f"architecture is {name!r}; supported are plain vit_SIZE_patchN_SIDE, their _clip, _siglip and "
                        f"_gap variants and deit_SIZE[_distilled]_patchN_SIDE, with SIZE one of {', '.join(HEADS)}")
    tower, data, arguments = match["tower"] or "", config.get("pretrained_cfg", {}), config.get("model_args") or {}
    unsupported(arguments, {"qk_norm": False, "qkv_bias": True, "init_values": None, "reg_tokens": 0,
                            "norm_layer": None, "no_embed_class": False, "dynamic_img_size": False}, "model_args")
    width, _, _, patch = _shape(tensors, "patch_embed.proj.weight", 4)
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    slots = _shape(tensors, "pos_embed", 3)[1] - class_token - distilled
    side = round(slots**0.5) * patch
    activation = "quick_gelu" if tower == "_clip_quickgelu" else "gelu_tanh" if TANH.fullmatch(name) else "gelu"
    activation = known({"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"},
                       arguments.get("act_layer", activation), "model_args.act_layer")
    pool = arguments.get("global_pool") or config.get("global_pool") or ("token" if class_token else "avg")
    model = ViTConfig(
        transformer=TransformerConfig(
            width=width, depth=layers.depth(tensors, "blocks."), heads=arguments.get("num_heads", HEADS[match["size"]]),
            mlp_dim=_shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0], activation=activation,
            eps=1e-5 if "clip" in tower else 1e-6, init="normal"),
        image_size=side, patch=patch, class_token=class_token, pool=known(POOLS, pool, "global_pool"),
        pre_norm="norm_pre.weight" in tensors, patch_bias="patch_embed.proj.bias" in tensors,
        norm_pooled="fc_norm.weight" in tensors, distillation_token=distilled,
        distillation_head="head_dist.weight" in tensors,
        classes=_shape(tensors, "head.weight", 2)[0] if "head.weight" in tensors else None)
    input_side, crop = data.get("input_size", [3, side, side])[-1], data.get("crop_pct", 0.875)
    image = ImageConfig(
        size=input_side, eval_resize=int(input_side / crop) / input_side,
        eval_crop=known({"center": "center", "squash": "squash"}, data.get("crop_mode", "center"), "crop_mode"),
        interpolation=known({"bicubic": "bicubic", "bilinear": "bilinear"}, data.get("interpolation", "bicubic"),
                            "interpolation"))
    pixels = Pixels(mean=tuple(data.get("mean", Pixels().mean)), std=tuple(data.get("std", Pixels().std)))
    notes = () if data else ("there is no pretrained_cfg: mean and std are taken to be 0.5",)
    if tower == "_siglip" and activation == "gelu":
        notes += ("timm computes this model with the exact GELU, and so does jaxmm; SigLIP was trained with the "
                  "tanh approximation",)
    names = config.get("label_names") or data.get("label_names")
    return Checkpoint(task=Classification(model=model, pixels=pixels), rows=rows(model), image=image, notes=notes,
                      labels=tuple(names) if names and len(names) == model.classes else None)


def rows(model: ViTConfig) -> list[Row]:
    """Return the rows of a ViT in timm's names."""
    result = [
        Row("patches/kernel", "patch_embed.proj.weight", CONV), Row("positions", "pos_embed", lead(1)),
        *layers.layers("encoder", "blocks.{}", attention=("attn.qkv.weight", "attn.qkv.bias"), out_name="attn.proj",
                       mlp=("mlp.fc1", "mlp.fc2"), norms=("norm1", "norm2")),
        *norm("norm", "fc_norm" if model.norm_pooled else "norm")]
    if model.patch_bias:
        result.append(Row("patches/bias", "patch_embed.proj.bias"))
    if model.class_token:
        result.append(Row("class_token", "cls_token", lead(2)))
    if model.distillation_token:
        result.append(Row("distillation_token", "dist_token", lead(2)))
    if model.pre_norm:
        result += norm("pre_norm", "norm_pre")
    if model.pool == "map":
        result += map_head("map_head", "attn_pool")
    if model.classes:
        result += dense("head", "head")
    if model.distillation_head:
        result += dense("distillation_head", "head_dist")
    return result


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe a folder that timm loads: a base model whose sizes are all `model_args`.

    Raises `FileError` if timm has no such model.
    """
    model, pixels = task.model, task.pixels
    stack = model.transformer
    expected = {"positions": "learned", "registers": 0, "pre_logits": None, "patch_bias": not model.pre_norm,
                "class_token": model.pool != "map", "position_class": True}
    if model.pool == "gap":
        del expected["class_token"]
    odd = differing(vars(model), expected)
    if stack.eps != (1e-5 if model.pre_norm else 1e-6):
        odd.append(f"eps = {stack.eps}")
    if model.norm_pooled != (model.pool == "gap"):
        odd.append(f"norm_pooled = {model.norm_pooled} with pool = {model.pool!r}")
    if odd:
        raise FileError(f"timm has no such vision transformer: {', '.join(odd)}")
    kind = "deit_base_distilled_patch16" if model.distillation_token else "vit_base_patch16" + (
        "_clip" if model.pre_norm else "_siglip" if model.pool == "map" else "")
    ratio = stack.mlp_dim / stack.width
    if int(stack.width * ratio) != stack.mlp_dim:  # timm truncates the product to an integer
        ratio = math.nextafter(ratio, math.inf)
    pool = {ours: theirs for theirs, ours in POOLS.items()}[model.pool]
    arguments = {"img_size": model.image_size, "patch_size": model.patch, "embed_dim": stack.width,
                 "depth": stack.depth, "num_heads": stack.heads, "mlp_ratio": ratio, "act_layer": stack.activation,
                 "class_token": model.class_token}
    side, resized = image.size, round(image.size * image.eval_resize)
    crop = side / resized if int(side / (side / resized)) == resized else math.nextafter(side / resized, 0)
    config = {
        "architecture": f"{kind}_224", "num_classes": model.classes or 0, "global_pool": pool,
        "num_features": stack.width, "model_args": arguments | {"global_pool": pool},
        "pretrained_cfg": {
            "input_size": [3, side, side], "fixed_input_size": True, "interpolation": image.interpolation,
            "crop_pct": crop, "crop_mode": "squash" if image.eval_crop == "squash" else "center",
            "mean": list(pixels.mean), "std": list(pixels.std), "num_classes": model.classes or 0, "pool_size": None,
            "first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"] if model.distillation_head
            else "head"}}
    return Export(configs={"config.json": config | ({"label_names": list(labels)} if labels else {})},
                  rows=rows(model))


def map_head(ours: str, theirs: str) -> list[Row]:
    """Return the rows of attention pooling, whose key and value are one layer there."""
    pairs = [row for part, name in enumerate(("key", "value")) for row in (
        Row(f"{ours}/attention/{name}/kernel", f"{theirs}.kv.weight", linear(), part, 2),
        Row(f"{ours}/attention/{name}/bias", f"{theirs}.kv.bias", FLAT, part, 2))]
    return [Row(f"{ours}/probe", f"{theirs}.latent"), *pairs,
            Row(f"{ours}/attention/query/kernel", f"{theirs}.q.weight", linear()),
            Row(f"{ours}/attention/query/bias", f"{theirs}.q.bias", FLAT),
            *layers.out(f"{ours}/attention", f"{theirs}.proj"), *norm(f"{ours}/mlp_norm", f"{theirs}.norm"),
            *dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"), *dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")]


def _shape(tensors: Tensors, key: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor that sizes are read off. Raises `FileError` if it is missing."""
    if key not in tensors or len(tensors[key].shape) != dimensions:
        shape = list(tensors[key].shape) if key in tensors else "missing"
        raise FileError(f"{key} is {shape}; expected {dimensions} dimensions, from which the model's sizes are read")
    return tensors[key].shape


FAMILY = Family(
    name="timm", matches=lambda files, tensors: "architecture" in (files.json("config.json") or {}),
    read=lambda files, tensors: read(files.json("config.json"), tensors), write=write, architecture=(ViTConfig,))
