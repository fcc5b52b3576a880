"""vision_transformer's and big_vision's `.npz` files: ViT, AugReg, SigLIP.

They hold no configuration. Sizes and heads are read off the arrays, the rest is the same for all models of the family:
epsilon 1e-6, the tanh approximation of GELU, pixels from -1 to 1.
"""

import re

from jaxmm.config import ImageConfig
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import INCEPTION
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.checkpoint import Checkpoint
from jaxmm.pretrained.families.transformers import siglip_words
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import PARTS
from jaxmm.pretrained.table import Row, lead

WRAPPERS = ("opt/target/", "params/")
"""What training put before every name."""
KINDS = {
    "vision_transformer": ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"),
    "big_vision": ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
}
"""A layer's parts: norm, attention, norm, MLP."""


def unwrapped(tensors: Tensors) -> Tensors:
    """The arrays by their names in the model."""
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in tensors):
            return {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    return tensors


def read(tensors: Tensors, name: str) -> Checkpoint:
    """Understands the arrays of an unwrapped `.npz`. Raises `FileError` for models that are not supported."""
    if "img/embedding/kernel" in tensors:
        return read_siglip(tensors)
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
    return _checkpoint(
        ViTConfig(**vars(model) | {"classes": head.shape[1] if head is not None else None,
                                   "pre_logits": tensors["pre_logits/kernel"].shape[1]
                                   if "pre_logits/kernel" in tensors else None}), rows, model.image_size)


def read_siglip(tensors: Tensors) -> Checkpoint:
    """SigLIP and SigLIP 2 of a fixed resolution: two towers, temperature and bias."""
    picture, words = vision(tensors, "img/"), stack(tensors, "txt/Encoder_0")
    vocabulary, _ = tensors["txt/Embed_0/embedding"].shape
    clip = CLIPConfig(
        vision=picture, embed_dim=picture.transformer.width, vision_projection=False, text_projection_bias=True,
        text=TextConfig(transformer=words, vocab_size=vocabulary, causal=False, pool="last",
                        context_length=tensors["txt/pos_embedding"].shape[1]), logit_bias=-10.0)
    rows = [*vision_rows(tensors, picture, "vision/", "img/"),
            Row("text/tokens/embedding", "txt/Embed_0/embedding"), Row("text/positions", "txt/pos_embedding", lead(1)),
            *layer_rows(tensors, "text/encoder", "txt/Encoder_0"),
            *flax_norm("text/norm", "txt/Encoder_0/encoder_norm"), *flax_dense("text_projection", "txt/head"),
            Row("logit_scale", "t", lead(1)), Row("logit_bias", "b", lead(1))]
    return _checkpoint(clip, rows, picture.image_size, siglip_words(vocabulary))


def _checkpoint(config, rows, size, words=None) -> Checkpoint:
    return Checkpoint(family="npz", config=config, rows=rows, pixels=INCEPTION, words=words,
                      image=ImageConfig(size=size, eval_crop="squash", interpolation="bilinear"))


def vision(tensors: Tensors, tower: str) -> ViTConfig:
    """The picture tower whose names begin with `tower`, without heads."""
    patch = tensors[f"{tower}embedding/kernel"].shape[0]
    class_token, pooling = f"{tower}cls" in tensors, f"{tower}MAPHead_0/probe" in tensors
    slots = tensors[_positions(tensors, tower)].shape[1]
    inside = class_token and _kind(tensors, f"{tower}Transformer") == "vision_transformer"
    return ViTConfig(
        transformer=stack(tensors, f"{tower}Transformer"), patch=patch, image_size=round((slots - inside)**0.5) * patch,
        class_token=class_token, position_class=inside, pool="map" if pooling else "cls" if class_token else "gap")


def stack(tensors: Tensors, encoder: str) -> TransformerConfig:
    """The layers under `encoder`."""
    _, attention, _, mlp = KINDS[_kind(tensors, encoder)]
    stacked = f"{encoder}/encoderblock/{attention}/query/kernel"
    if stacked in tensors:
        depth, width, heads, _ = tensors[stacked].shape
        mlp_dim = tensors[f"{encoder}/encoderblock/{mlp}/Dense_0/kernel"].shape[2]
    else:
        numbers = [int(found[1]) for key in tensors if (found := re.match(rf"{encoder}/encoderblock_(\d+)/", key))]
        depth = 1 + max(numbers)
        width, heads, _ = tensors[f"{encoder}/encoderblock_0/{attention}/query/kernel"].shape
        mlp_dim = tensors[f"{encoder}/encoderblock_0/{mlp}/Dense_0/kernel"].shape[1]
    return TransformerConfig(width=width, depth=depth, heads=heads, mlp_dim=mlp_dim, activation="gelu_tanh", eps=1e-6)


def vision_rows(tensors: Tensors, model: ViTConfig, ours: str, theirs: str) -> list[Row]:
    """The weights of a picture tower."""
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
    """A stack of layers, each in arrays of its own or all in one, as big_vision's scanned models have them."""
    first, attention, second, mlp = KINDS[_kind(tensors, encoder)]
    stacked = f"{encoder}/encoderblock/{attention}/query/kernel" in tensors
    block, layer = f"{ours}/blocks", f"{encoder}/encoderblock" + ("" if stacked else "_{}")
    return [*flax_norm(f"{block}/attention_norm", f"{layer}/{first}"),
            *flax_attention(f"{block}/attention", f"{layer}/{attention}"),
            *flax_norm(f"{block}/mlp_norm", f"{layer}/{second}"), *flax_mlp(f"{block}/mlp", f"{layer}/{mlp}")]


def flax_dense(ours: str, theirs: str) -> list[Row]:
    """Anything with a kernel and a bias: Flax lays both out as we do."""
    return [Row(f"{ours}/{part}", f"{theirs}/{part}") for part in ("kernel", "bias")]


def flax_norm(ours: str, theirs: str) -> list[Row]:
    """A layer norm of Flax's."""
    return [Row(f"{ours}/{part}", f"{theirs}/{part}") for part in ("scale", "bias")]


def flax_attention(ours: str, theirs: str) -> list[Row]:
    """Attention of Flax's."""
    return [row for name in (*PARTS, "out") for row in flax_dense(f"{ours}/{name}", f"{theirs}/{name}")]


def flax_mlp(ours: str, theirs: str) -> list[Row]:
    """The MLP of a layer."""
    return flax_dense(f"{ours}/up", f"{theirs}/Dense_0") + flax_dense(f"{ours}/down", f"{theirs}/Dense_1")


def _kind(tensors: Tensors, encoder: str) -> str:
    old = re.compile(rf"{encoder}/encoderblock_0/{KINDS['vision_transformer'][1]}/")
    return "vision_transformer" if any(old.match(key) for key in tensors) else "big_vision"


def _positions(tensors: Tensors, tower: str) -> str:
    old = f"{tower}Transformer/posembed_input/pos_embedding"
    return old if old in tensors else f"{tower}pos_embedding"
