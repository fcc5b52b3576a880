"""vision_transformer's and big_vision's `.npz` files: ViT, AugReg, SigLIP.

They hold no configuration. Sizes and heads are read off the arrays. The rest is the same for all models of the family:
epsilon 1e-6, the tanh approximation of GELU, pixels from -1 to 1.
"""

import re
from dataclasses import replace

from jaxmm.config import ImageConfig
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import INCEPTION
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.family import Checkpoint, Family
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import PARTS
from jaxmm.pretrained.table import Row, lead
from jaxmm.pretrained.tokenizer import siglip_vocabulary
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_classification import Classification

WRAPPERS = ("opt/target/", "params/")
"""Prefixes that training puts before every name."""
KINDS = {
    "vision_transformer": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "big_vision": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}
"""A layer's parts: norm, attention, norm, MLP."""


def read(tensors: Tensors, name: str) -> Checkpoint:
    """Describe the arrays of an `.npz`. Raises `FileError` for models that are not supported."""
    wrapper = next((wrapper for wrapper in WRAPPERS if all(key.startswith(wrapper) for key in tensors)), "")
    tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    checkpoint = read_siglip(tensors) if "img/embedding/kernel" in tensors else read_vit(tensors, name)
    return replace(checkpoint, rows=[replace(row, theirs=wrapper + row.theirs) for row in checkpoint.rows])


def read_vit(tensors: Tensors, name: str) -> Checkpoint:
    """Describe a classifier or a bare vision transformer."""
    if any(key.startswith("conv_root") for key in tensors):
        raise FileError(f"{name} holds a hybrid with a ResNet in front; supported are plain vision transformers")
    if "embedding/kernel" not in tensors:
        raise FileError(f"{name} holds no embedding/kernel: it is no ViT of vision_transformer or big_vision")
    model = vision(tensors, "")
    head = tensors.get("head/kernel")
    rows = vision_rows(tensors, model, "", "")
    if "pre_logits/kernel" in tensors:
        rows += flax_dense("pre_logits", "pre_logits")
    if head is not None:
        rows += flax_dense("head", "head")
    model = replace(model, classes=None if head is None else head.shape[1], pre_logits=tensors[
        "pre_logits/kernel"].shape[1] if "pre_logits/kernel" in tensors else None)
    return Checkpoint(task=Classification(model=model, pixels=INCEPTION), rows=rows, image=_image(model))


def read_siglip(tensors: Tensors) -> Checkpoint:
    """Describe SigLIP or SigLIP 2 of a fixed resolution: two towers, temperature and bias."""
    image, text = vision(tensors, "img/"), stack(tensors, "txt/Encoder_0")
    size, _ = tensors["txt/Embed_0/embedding"].shape
    length = tensors["txt/pos_embedding"].shape[1]
    clip = CLIPConfig(
        vision=image, embed_dim=image.transformer.width, vision_projection=False, text_projection_bias=True,
        text=TextConfig(transformer=text, vocab_size=size, causal=False, pool="last", context_length=length),
        logit_bias=-10.0)
    rows = [*vision_rows(tensors, image, "vision/", "img/"),
            Row("text/tokens/embedding", "txt/Embed_0/embedding"), Row("text/positions", "txt/pos_embedding", lead(1)),
            *layer_rows(tensors, "text/encoder", "txt/Encoder_0"),
            *flax_norm("text/norm", "txt/Encoder_0/encoder_norm"), *flax_dense("text_projection", "txt/head"),
            Row("logit_scale", "t", lead(1)), Row("logit_bias", "b", lead(1))]
    return Checkpoint(task=ContrastiveLearning(model=clip, pixels=INCEPTION, kind="sigmoid"), rows=rows,
                      image=_image(image), vocabulary=siglip_vocabulary(length, size))


def _image(model: ViTConfig) -> ImageConfig:
    return ImageConfig(size=model.image_size, eval_crop="squash", interpolation="bilinear")


def vision(tensors: Tensors, tower: str) -> ViTConfig:
    """Return the configuration of the image tower whose names begin with `tower`, without heads."""
    patch = tensors[f"{tower}embedding/kernel"].shape[0]
    class_token, pooling = f"{tower}cls" in tensors, f"{tower}MAPHead_0/probe" in tensors
    slots = tensors[_positions(tensors, tower)].shape[1]
    inside = class_token and _kind(tensors, f"{tower}Transformer") == "vision_transformer"
    return ViTConfig(
        transformer=stack(tensors, f"{tower}Transformer"), patch=patch, image_size=round((slots - inside)**0.5) * patch,
        class_token=class_token, position_class=inside, pool="map" if pooling else "cls" if class_token else "gap")


def stack(tensors: Tensors, encoder: str) -> TransformerConfig:
    """Return the configuration of the layers under `encoder`."""
    _, attention, _, mlp = KINDS[_kind(tensors, encoder)]
    stacked = f"{encoder}/encoderblock/{attention}/query/kernel"
    if stacked in tensors:
        depth, width, heads, _ = tensors[stacked].shape
        mlp_dim = tensors[f"{encoder}/encoderblock/{mlp}/Dense_0/kernel"].shape[2]
    else:
        numbers = [int(match[1]) for key in tensors if (match := re.match(rf"{encoder}/encoderblock_(\d+)/", key))]
        depth = 1 + max(numbers)
        width, heads, _ = tensors[f"{encoder}/encoderblock_0/{attention}/query/kernel"].shape
        mlp_dim = tensors[f"{encoder}/encoderblock_0/{mlp}/Dense_0/kernel"].shape[1]
    return TransformerConfig(width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, activation="gelu_tanh", eps=1e-6)


def vision_rows(tensors: Tensors, model: ViTConfig, ours: str, theirs: str) -> list[Row]:
    """Return the rows of an image tower."""
    encoder = f"{theirs}Transformer"
    rows = [*flax_dense(f"{ours}patches", f"{theirs}embedding"),
            Row(f"{ours}positions", _positions(tensors, theirs), lead(1)),
            *layer_rows(tensors, f"{ours}encoder", encoder), *flax_norm(f"{ours}norm", f"{encoder}/encoder_norm")]
    if model.class_token:
        rows.append(Row(f"{ours}class_token", f"{theirs}cls", lead(2)))
    if model.pool == "map":
        head = f"{theirs}MAPHead_0"
        rows += [Row(f"{ours}map_head/probe", f"{head}/probe"),
                 *flax_attention(f"{ours}map_head/attention", f"{head}/MultiHeadDotProductAttention_0"),
                 *flax_norm(f"{ours}map_head/mlp_norm", f"{head}/LayerNorm_0"),
                 *flax_mlp(f"{ours}map_head/mlp", f"{head}/MlpBlock_0")]
    return rows


def layer_rows(tensors: Tensors, ours: str, encoder: str) -> list[Row]:
    """Return the rows of a stack: arrays per layer, or stacked arrays as in big_vision's scanned models."""
    first, attention, second, mlp = KINDS[_kind(tensors, encoder)]
    stacked = f"{encoder}/encoderblock/{attention}/query/kernel" in tensors
    block, layer = f"{ours}/blocks", f"{encoder}/encoderblock" + ("" if stacked else "_{}")
    return [*flax_norm(f"{block}/attention_norm", f"{layer}/{first}"),
            *flax_attention(f"{block}/attention", f"{layer}/{attention}"),
            *flax_norm(f"{block}/mlp_norm", f"{layer}/{second}"), *flax_mlp(f"{block}/mlp", f"{layer}/{mlp}")]


def flax_dense(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a kernel and a bias, which Flax lays out like we do."""
    return [Row(f"{ours}/{part}", f"{theirs}/{part}") for part in ("kernel", "bias")]


def flax_norm(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a Flax layer norm."""
    return [Row(f"{ours}/{part}", f"{theirs}/{part}") for part in ("scale", "bias")]


def flax_attention(ours: str, theirs: str) -> list[Row]:
    """Return the rows of Flax attention."""
    return [row for name in (*PARTS, "out") for row in flax_dense(f"{ours}/{name}", f"{theirs}/{name}")]


def flax_mlp(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a layer's MLP."""
    return flax_dense(f"{ours}/up", f"{theirs}/Dense_0") + flax_dense(f"{ours}/down", f"{theirs}/Dense_1")


def _kind(tensors: Tensors, encoder: str) -> str:
    old = re.compile(rf"{encoder}/encoderblock_0/{KINDS['vision_transformer'][1]}/")
    return "vision_transformer" if any(old.match(key) for key in tensors) else "big_vision"


def _positions(tensors: Tensors, tower: str) -> str:
    old = f"{tower}Transformer/posembed_input/pos_embedding"
    return old if old in tensors else f"{tower}pos_embedding"


FAMILY = Family(name="npz", matches=lambda files, tensors: files.weights.suffix == ".npz", resize="linear",
                read=lambda files, tensors: read(tensors, files.name))
