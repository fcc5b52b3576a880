"""transformers' ViT, DeiT, CLIP and SigLIP (versions 4 and 5): configuration, preprocessing and names of the weights.

Fields that a `config.json` leaves out get the defaults of the class in transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP_PIXELS, IMAGENET, INCEPTION
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained import layers
from jaxmm.pretrained.families.image_processor import (
    PREPROCESSOR,
    preprocessor,
    read_preprocessor,
    square,
    write_preprocessor,
)
from jaxmm.pretrained.family import Checkpoint, Export, Family, differing, known, unsupported
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, norm, torch_map_head
from jaxmm.pretrained.table import CONV, Row, lead
from jaxmm.pretrained.tokenizer import clip_vocabulary, siglip_vocabulary
from jaxmm.task import Task
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_classification import Classification

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
STACK = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT = STACK | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16}
CLIP_VISION = STACK | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32}
CLIP_TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048,
             "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "vocab_size": 49_408, "max_position_embeddings": 77,
             "eos_token_id": 49_407}
SIGLIP_VISION = STACK | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": 224,
                         "patch_size": 16}
SIGLIP_TEXT = STACK | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vocab_size": 32_000,
                       "max_position_embeddings": 64}
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size", "vocab_size",
         "max_position_embeddings")
"""Fields that the weights would contradict if they were wrong."""
LAYER = {"attention": {name: f"self_attn.{name[0]}_proj" for name in layers.PARTS}, "out_name": "self_attn.out_proj",
         "mlp": ("mlp.fc1", "mlp.fc2"), "norms": ("layer_norm1", "layer_norm2")}
"""Names in a layer of CLIP and SigLIP."""
HEADS = ("classifier", "cls_classifier", "distillation_classifier")
VIT_LAYERS = {
    4: ("encoder.layer.{}", {"attention": {name: f"attention.attention.{name}" for name in layers.PARTS},
                             "out_name": "attention.output.dense", "mlp": ("intermediate.dense", "output.dense")}),
    5: ("layers.{}", {"attention": {name: f"attention.{name[0]}_proj" for name in layers.PARTS},
                      "out_name": "attention.o_proj", "mlp": ("mlp.fc1", "mlp.fc2")}),
}
"""Names in a layer of ViT and DeiT, by the version of the names."""


def read(config: Mapping[str, Any], tensors: Tensors, preprocessor: Mapping[str, Any] | None) -> Checkpoint:
    """Describe a folder of transformers from its `config.json`, preprocessing and weights.

    Raises `FileError` for models and settings that are not supported.
    """
    readers = {"vit": read_vit, "deit": read_vit, "clip": read_clip, "siglip": read_siglip}
    return known(readers, config.get("model_type"), "model_type")(config, tensors, preprocessor)


def stack(config: Mapping[str, Any], **fields: Any) -> TransformerConfig:
    """Return the layers that a configuration of transformers describes."""
    unsupported(config, {"qkv_bias": True, "hidden_dropout_prob": 0.0, "num_channels": 3}, "config.json")
    return TransformerConfig(
        width=config["hidden_size"], depth=config["num_hidden_layers"], heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"], eps=config["layer_norm_eps"],
        activation=known(ACTIVATIONS, config["hidden_act"], "hidden_act"), **fields)


def tower(config: Mapping[str, Any], name: str, default: Mapping[str, Any], old: Mapping[str, Any] | None = None
          ) -> dict[str, Any]:
    """Return the configuration `NAME_config` of a tower over the `default` of its class.

    A configuration `old`, as folders from before 2023 have it, has precedence, as in transformers: with its defaults,
    except those of sizes, which transformers could not load.
    """
    settings = {} if old is None else {key: value for key, value in default.items() if key not in SIZES}
    return squares({**default, **(config.get(f"{name}_config") or {}), **settings, **(old or {})})


def squares(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose images and patches have one side, though it gives both. Raises `FileError`."""
    return config | {name: square(config[name], "config.json", name) for name in ("image_size", "patch_size")
                     if name in config}


def class_names(config: Mapping[str, Any], classes: int | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the names of all classes from `id2label`, or None, and a note if some of them have none."""
    labels = config.get("id2label")
    labels = {str(i): name for i, name in enumerate(labels)} if isinstance(labels, list) else labels
    if not labels or not classes:
        return None, ()
    names = tuple(str(labels.get(str(i), f"LABEL_{i}")) for i in range(classes))
    unnamed = sum(str(i) not in labels for i in range(classes))
    return names, (f"id2label names {classes - unnamed} of {classes} classes; the others are LABEL_NUMBER",
                   ) if unnamed or len(labels) != classes else ()


def read_vit(config, tensors, preprocessor) -> Checkpoint:
    """Describe ViT or DeiT, with a classification head, with the pooler of a bare model, or with neither."""
    deit, full = config["model_type"] == "deit", squares(VIT | config)
    prefix = next((p for p in ("vit.", "deit.") if any(key.startswith(p) for key in tensors)), "")
    version = 5 if any(key.startswith(f"{prefix}layers.") for key in tensors) else 4
    heads = [name for name in HEADS if f"{name}.weight" in tensors]
    pooler = f"{prefix}pooler.dense.weight"
    model = ViTConfig(
        transformer=stack(full), image_size=full["image_size"], patch=full["patch_size"],
        distillation_token=deit, distillation_head="distillation_classifier" in heads,
        pre_logits=tensors[pooler].shape[0] if pooler in tensors and not heads else None,
        classes=tensors[f"{heads[0]}.weight"].shape[0] if heads else None)
    notes = []
    if full["layer_norm_eps"] == 1e-12 and not deit:
        notes.append("layer_norm_eps is 1e-12, as the file says and transformers computes; Google's original weights "
                     "were trained with 1e-6")
    if deit and "cls_classifier" not in heads and heads:
        notes.append("only the class token's head is in the file; DeiT averages it with that of the distillation token")
    side = full["image_size"]
    default = {"size": round(side * 8 / 7), "crop": side, "resample": 3} if deit else {"size": side, "resample": 2}
    image, pixels, more = read_preprocessor(preprocessor, model, IMAGENET if deit else INCEPTION, default)
    labels, unnamed = class_names(config, model.classes)
    return Checkpoint(
        task=Classification(model=model, pixels=pixels), rows=vit_rows(model, prefix, version, heads), image=image,
        labels=labels, ignore=(rf"^{prefix}pooler\.",) if heads else (), notes=(*notes, *unnamed, *more))


def vit_rows(model: ViTConfig, prefix: str, version: int, heads: list[str]) -> list[Row]:
    """Return the rows of ViT and DeiT."""
    embeddings, (where, names) = f"{prefix}embeddings", VIT_LAYERS[version]
    rows = [*patches(f"{embeddings}.patch_embeddings.projection", model.patch_bias, ""),
            Row("positions", f"{embeddings}.position_embeddings", lead(1)),
            Row("class_token", f"{embeddings}.cls_token", lead(2)),
            *layers.layers("encoder", prefix + where, norms=("layernorm_before", "layernorm_after"), **names),
            *norm("norm", f"{prefix}layernorm")]
    if model.distillation_token:
        rows.append(Row("distillation_token", f"{embeddings}.distillation_token", lead(2)))
    if model.pre_logits:
        rows += dense("pre_logits", f"{prefix}pooler.dense")
    if model.classes:
        rows += dense("head", heads[0])
    if model.distillation_head:
        rows += dense("distillation_head", heads[1])
    return rows


def patches(theirs: str, bias: bool, tower: str) -> list[Row]:
    """Return the rows of the patch embedding, a convolution there."""
    return [Row(f"{tower}patches/kernel", f"{theirs}.weight", CONV)] + (
        [Row(f"{tower}patches/bias", f"{theirs}.bias")] if bias else [])


def read_clip(config, tensors, preprocessor) -> Checkpoint:
    """Describe CLIP with both towers."""
    vision = tower(config, "vision", CLIP_VISION, config.get("vision_config_dict"))
    text = tower(config, "text", CLIP_TEXT, config.get("text_config_dict"))
    notes, eos = [], text["eos_token_id"]
    if eos == 2:
        notes.append("text_config.eos_token_id is 2, as in files from before 2023; the text is pooled at the largest "
                     "id, as transformers does for them")
    model = CLIPConfig(
        vision=ViTConfig(transformer=stack(vision), image_size=vision["image_size"], patch=vision["patch_size"],
                         pre_norm=True, patch_bias=False),
        text=TextConfig(transformer=stack(text), vocab_size=text["vocab_size"],
                        context_length=text["max_position_embeddings"],
                        **({"pool": "argmax"} if eos == 2 else {"pool": "eos", "eos_id": eos})),
        embed_dim=config.get("projection_dim", 512))
    default = {"size": model.vision.image_size, "shortest": True, "crop": model.vision.image_size, "resample": 3}
    image, pixels, more = read_preprocessor(preprocessor, model.vision, CLIP_PIXELS, default)
    return Checkpoint(task=ContrastiveLearning(model=model, pixels=pixels, kind="softmax"), rows=clip_rows(),
                      image=image, vocabulary=clip_vocabulary(model.text.context_length),
                      ignore=(r"\.position_ids$",), notes=(*notes, *more))


def clip_rows() -> list[Row]:
    """Return the rows of CLIP."""
    vision, text = "vision_model", "text_model"
    return [
        *patches(f"{vision}.embeddings.patch_embedding", False, "vision/"),
        Row("vision/class_token", f"{vision}.embeddings.class_embedding"),
        Row("vision/positions", f"{vision}.embeddings.position_embedding.weight"),
        *norm("vision/pre_norm", f"{vision}.pre_layrnorm"),  # as it is spelt there
        *layers.layers("vision/encoder", f"{vision}.encoder.layers.{{}}", **LAYER),
        *norm("vision/norm", f"{vision}.post_layernorm"), *text_rows(text),
        *dense("vision_projection", "visual_projection", bias=False),
        *dense("text_projection", "text_projection", bias=False), Row("logit_scale", "logit_scale")]


def text_rows(theirs: str) -> list[Row]:
    """Return the rows of the text tower of CLIP and SigLIP."""
    return [Row("text/tokens/embedding", f"{theirs}.embeddings.token_embedding.weight"),
            Row("text/positions", f"{theirs}.embeddings.position_embedding.weight"),
            *layers.layers("text/encoder", f"{theirs}.encoder.layers.{{}}", **LAYER),
            *norm("text/norm", f"{theirs}.final_layer_norm")]


def read_siglip(config, tensors, preprocessor) -> Checkpoint:
    """Describe SigLIP, or SigLIP 2 of a fixed resolution."""
    vision, text = tower(config, "vision", SIGLIP_VISION), tower(config, "text", SIGLIP_TEXT)
    unsupported(vision, {"vision_use_head": True}, "vision_config")
    unsupported(text, {"projection_size": vision["hidden_size"]}, "text_config")
    model = CLIPConfig(
        vision=ViTConfig(transformer=stack(vision), patch=vision["patch_size"], pool="map", class_token=False,
                         image_size=vision["image_size"] // vision["patch_size"] * vision["patch_size"]),
        text=TextConfig(transformer=stack(text), vocab_size=text["vocab_size"],
                        context_length=text["max_position_embeddings"], causal=False, pool="last"),
        embed_dim=vision["hidden_size"], vision_projection=False, text_projection_bias=True,
        logit_scale=math.log(10), logit_bias=-10.0)
    default = {"size": vision["image_size"], "resample": 3}
    image, pixels, more = read_preprocessor(preprocessor, model.vision, INCEPTION, default)
    return Checkpoint(task=ContrastiveLearning(model=model, pixels=pixels, kind="sigmoid"), rows=siglip_rows(),
                      image=image, vocabulary=siglip_vocabulary(model.text.context_length, model.text.vocab_size),
                      ignore=(r"\.position_ids$",), notes=more)


def siglip_rows() -> list[Row]:
    """Return the rows of SigLIP."""
    return [
        *patches("vision_model.embeddings.patch_embedding", True, "vision/"),
        Row("vision/positions", "vision_model.embeddings.position_embedding.weight"),
        *layers.layers("vision/encoder", "vision_model.encoder.layers.{}", **LAYER),
        *norm("vision/norm", "vision_model.post_layernorm"),
        *torch_map_head("vision/map_head", "vision_model.head"), *text_rows("text_model"),
        *dense("text_projection", "text_model.head"),
        Row("logit_scale", "logit_scale", lead(1)), Row("logit_bias", "logit_bias", lead(1))]


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe a folder that transformers loads. Raises `FileError` if no class there computes what the model does."""
    config, rows = {ViTConfig: write_vit, CLIPConfig: write_towers}[type(task.model)](task.model, labels)
    return Export(configs={"config.json": config, PREPROCESSOR: write_preprocessor(
        image, task.pixels, config["model_type"])}, rows=rows)


def write_stack(stack: TransformerConfig) -> dict[str, Any]:
    """Invert `stack`."""
    names = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
    return {"hidden_size": stack.width, "num_hidden_layers": stack.depth, "num_attention_heads": stack.heads,
            "intermediate_size": stack.mlp_dim, "layer_norm_eps": stack.eps, "hidden_act": names[stack.activation]}


def write_vit(model: ViTConfig, labels: tuple[str, ...] | None) -> tuple[dict[str, Any], list[Row]]:
    """Describe `ViTForImageClassification`, `ViTModel` or DeiT's."""
    _only(model, class_token=True, position_class=True, positions="learned", pool="cls", registers=0, pre_norm=False,
          norm_pooled=False, patch_bias=True)
    deit = model.distillation_token
    kind, heads, prefix = "DeiT" if deit else "ViT", ["classifier"], "deit." if deit else "vit."
    if model.distillation_head:
        kind, heads = "DeiT", ["cls_classifier", "distillation_classifier"]
    architecture = f"{kind}ForImageClassification" + ("WithTeacher" if model.distillation_head else "")
    if not model.classes:
        architecture, prefix = f"{kind}Model", ""
    elif model.pre_logits:
        raise FileError("transformers has no classifier behind a pre-logits layer; expected pre_logits None")
    config = {"model_type": kind.lower(), "architectures": [architecture], "image_size": model.image_size,
              "patch_size": model.patch, "num_channels": 3, "qkv_bias": True, "encoder_stride": model.patch,
              "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | write_stack(model.transformer)
    if model.classes:
        names = labels or tuple(f"LABEL_{i}" for i in range(model.classes))
        config |= {"id2label": {str(i): name for i, name in enumerate(names)},
                   "label2id": {name: i for i, name in enumerate(names)}}
    if model.pre_logits:
        config |= {"pooler_output_size": model.pre_logits, "pooler_act": "tanh"}
    return config, vit_rows(model, prefix, 4, heads)


def write_towers(model: CLIPConfig, labels: None) -> tuple[dict[str, Any], list[Row]]:
    """Describe `CLIPModel`, or with a bias `SiglipModel`."""
    if model.logit_bias is None:
        return write_clip(model), clip_rows()
    return write_siglip(model), siglip_rows()


def write_clip(model: CLIPConfig) -> dict[str, Any]:
    """Describe `CLIPModel`."""
    vision, text = model.vision, model.text
    _only(vision, class_token=True, position_class=True, positions="learned", pool="cls", registers=0, pre_norm=True,
          norm_pooled=False, patch_bias=False, pre_logits=None, distillation_token=False)
    _only(text, causal=True, pad_id=None)
    _only(model, vision_projection=True, text_projection_bias=False)
    if text.pool not in ("eos", "argmax"):
        raise FileError(f"text.pool is {text.pool!r}; CLIP of transformers pools the end token")
    eos = 2 if text.pool == "argmax" else text.eos_id  # 2: the largest id, whatever it is
    common = {"projection_dim": model.embed_dim, "attention_dropout": 0.0}
    return {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.logit_scale,
        "vision_config": common | {"model_type": "clip_vision_model", "image_size": vision.image_size,
                                   "patch_size": vision.patch, "num_channels": 3, "attention_dropout": 0.0,
                          } | write_stack(vision.transformer),
        "text_config": common | {"model_type": "clip_text_model", "vocab_size": text.vocab_size,
                                 "max_position_embeddings": text.context_length, "eos_token_id": eos,
                                 } | write_stack(text.transformer)}


def write_siglip(model: CLIPConfig) -> dict[str, Any]:
    """Describe `SiglipModel`."""
    vision, text = model.vision, model.text
    _only(vision, class_token=False, positions="learned", pool="map", registers=0, pre_norm=False, patch_bias=True,
          pre_logits=None)
    _only(text, causal=False, pad_id=None, pool="last")
    _only(model, vision_projection=False, text_projection_bias=True)
    return {
        "model_type": "siglip", "architectures": ["SiglipModel"],
        "vision_config": {"model_type": "siglip_vision_model", "image_size": vision.image_size,
                          "patch_size": vision.patch, "num_channels": 3, "attention_dropout": 0.0,
                          } | write_stack(vision.transformer),
        "text_config": {"model_type": "siglip_text_model", "vocab_size": text.vocab_size,
                        "max_position_embeddings": text.context_length, "projection_size": model.embed_dim,
                        "attention_dropout": 0.0,
                        } | write_stack(text.transformer)}


def _only(config: Any, **expected: Any) -> None:
    """Raise `FileError` with every field of `config` that the class in transformers cannot express, if any."""
    if odd := differing(vars(config), expected):
        raise FileError(f"transformers has no such {type(config).__name__}: {', '.join(odd)}")


FAMILY = Family(
    name="transformers", matches=lambda files, tensors: "model_type" in (files.json("config.json") or {}),
    read=lambda files, tensors: read(files.json("config.json"), tensors, preprocessor(files)), write=write,
    architecture=(ViTConfig, CLIPConfig), resize="bicubic")
