"""open_clip's CLIP (`CLIP` and `CustomTextCLIP` with the built-in towers) and OpenAI's original files."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained import layers
from jaxmm.pretrained.families.open_clip_names import fitting, named_config
from jaxmm.pretrained.families.open_clip_names import is_openai as is_openai_file
from jaxmm.pretrained.family import Checkpoint, Export, Family, differing, known, unsupported
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, norm
from jaxmm.pretrained.table import CONV, Row
from jaxmm.pretrained.tokenizer import Vocabulary, file_vocabulary, is_openai, openai_vocabulary
from jaxmm.task import Task
from jaxmm.tasks.contrastive_learning import ContrastiveLearning

POOLS = {"tok": "cls", "avg": "gap"}
TEXT_POOLS = {"argmax": "argmax", "eos": "eos", "first": "first", "last": "last"}
IGNORED = (r"^(input_resolution|context_length|vocab_size)$", r"\battn_mask$")
"""Keys of constants beside the weights, in OpenAI's archives and old state dicts."""


def read(config: Mapping[str, Any], tensors: Tensors) -> Checkpoint:
    """Describe `open_clip_config.json` with its weights. Raises `FileError` for towers that are not built in."""
    model, data = config["model_cfg"], config.get("preprocess_cfg", {})
    vision, text = model["vision_cfg"], model["text_cfg"]
    for name in ("timm_model_name", "hf_model_name"):
        if vision.get(name) or text.get(name):
            raise FileError(f"{name} is {vision.get(name) or text.get(name)!r}; supported are open_clip's own towers")
    if isinstance(vision.get("layers"), list):
        raise FileError("vision_cfg.layers is a list: a ResNet; supported are vision transformers")
    unsupported(model, {"multimodal_cfg": None}, "model_cfg")
    unsupported(vision, {"ls_init_value": None, "attentional_pool": False, "input_patchnorm": False,
                         "pos_embed_type": "learnable"}, "vision_cfg")
    unsupported(text, {"ls_init_value": None, "embed_cls": False, "final_ln_after_pool": False, "proj_type": "linear"},
                "text_cfg")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

    def stack(tower, width, heads):
        act = {"tanh": "gelu_tanh"}.get(tower.get("act_kwargs", {}).get("approximate"), activation)
        return TransformerConfig(width=width, depth=tower["layers"], heads=heads, activation=act,
                                 mlp_dim=int(width * tower.get("mlp_ratio", 4.0)),
                                 eps=tower.get("norm_kwargs", {}).get("eps", 1e-5))

    pool = "avg" if vision.get("global_average_pool") else vision.get("pool_type", "tok")
    after = bool(vision.get("final_ln_after_pool"))
    image_tower = ViTConfig(
        transformer=stack(vision, vision["width"], vision["width"] // vision.get("head_width", 64)),
        image_size=_side(vision.get("image_size", 224)), patch=vision["patch_size"],
        pool=known(POOLS, pool, "vision_cfg.pool_type"), norm_pooled=after and pool == "avg",
        pre_norm=not vision.get("no_ln_pre"), patch_bias=False)
    text_tower = TextConfig(
        transformer=stack(text, text.get("width", 512), text.get("heads", 8)),
        vocab_size=text.get("vocab_size", 49_408), context_length=text.get("context_length", 77),
        causal=not text.get("no_causal_mask"),
        pool=known(TEXT_POOLS, text.get("pool_type", "argmax"), "text_cfg.pool_type"),
        eos_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None)
    bias = "logit_bias" in tensors
    clip = CLIPConfig(vision=image_tower, text=text_tower, embed_dim=model["embed_dim"],
                      text_projection_bias=bool(text.get("proj_bias")),
                      logit_scale=model.get("init_logit_scale") or math.log(1 / 0.07),
                      logit_bias=(model.get("init_logit_bias") or -10.0) if bias else None)
    image = ImageConfig(
        size=_side(data.get("size", image_tower.image_size)), interpolation=data.get("interpolation", "bicubic"),
        eval_crop=known({"shortest": "center", "squash": "squash"}, data.get("resize_mode", "shortest"),
                        "resize_mode"))
    pixels = Pixels(mean=tuple(data.get("mean", CLIP_PIXELS.mean)), std=tuple(data.get("std", CLIP_PIXELS.std)))
    notes = () if data else ("there is no preprocess_cfg: images are prepared as for OpenAI's models",)
    task = ContrastiveLearning(model=clip, pixels=pixels, kind="sigmoid" if bias else "softmax")
    return Checkpoint(task=task, rows=rows(clip, custom="text.token_embedding.weight" in tensors), image=image,
                      vocabulary=vocabulary(text, text_tower.context_length), ignore=IGNORED, notes=notes)


def read_named(architecture: str, tensors: Tensors) -> Checkpoint:
    """Describe weights without a configuration, of the `architecture` that is named (see `open_clip_names`).

    Raises `FileError` if they do not fit.
    """
    config, notes = named_config(architecture, tensors)
    checkpoint = read({"model_cfg": config}, tensors)
    return replace(checkpoint, notes=(*notes, *checkpoint.notes))


def read_openai(tensors: Tensors) -> Checkpoint:
    """Describe OpenAI's files. They hold no configuration; sizes are read off the weights, as OpenAI's code does.

    Raises `FileError` for other files of the same names: their activation and heads may be others.
    """
    if any(key.startswith("visual.layer1.") for key in tensors):
        raise FileError("visual is a ModifiedResNet; supported are vision transformers")
    if not is_openai_file(tensors):
        raise FileError("this is a CLIP without a configuration, and the weights show neither its activation nor its "
                        "heads; expected open_clip_config.json beside it, or its architecture (an option of load and "
                        f"of jaxmm convert): {fitting(tensors)}")
    conv, positions = tensors["visual.conv1.weight"].shape, tensors["visual.positional_embedding"].shape

    def stack(width, prefix):
        return TransformerConfig(width=width, depth=layers.depth(tensors, prefix), heads=width // 64,
                                 mlp_dim=4 * width, eps=1e-5, activation="quick_gelu")

    side = math.isqrt(positions[0] - 1) * conv[-1]
    vocab_size, width = tensors["token_embedding.weight"].shape
    length = tensors["positional_embedding"].shape[0]
    clip = CLIPConfig(
        vision=ViTConfig(transformer=stack(conv[0], "visual.transformer.resblocks."), image_size=side, patch=conv[-1],
                         pre_norm=True, patch_bias=False),
        text=TextConfig(transformer=stack(width, "transformer.resblocks."), vocab_size=vocab_size,
                        context_length=length),
        embed_dim=tensors["text_projection"].shape[1])
    return Checkpoint(task=ContrastiveLearning(model=clip, pixels=CLIP_PIXELS, kind="softmax"),
                      rows=rows(clip, custom=False), image=ImageConfig(size=side),
                      vocabulary=openai_vocabulary(length), ignore=IGNORED)


def vocabulary(text: Mapping[str, Any], context_length: int) -> Vocabulary:
    """Return CLIP's vocabulary, or that of `hf_tokenizer_name`, whose `tokenizer.json` lies in the folder."""
    options = text.get("tokenizer_kwargs") or {}
    unsupported(options, {"strip_sep_token": False, "reduction_mask": ""}, "text_cfg.tokenizer_kwargs")
    if not text.get("hf_tokenizer_name"):
        unsupported(options, {"clean": "lower"}, "text_cfg.tokenizer_kwargs")
        return openai_vocabulary(context_length, ("<start_of_text>", "<end_of_text>"))
    cleanings = {"whitespace": "whitespace", "lower": "openai", "canonicalize": "canonical"}
    return file_vocabulary(context_length, known(cleanings, options.get("clean", "whitespace"), "clean"))


def rows(clip: CLIPConfig, *, custom: bool) -> list[Row]:
    """Return the rows of a CLIP; `custom` if the text tower is a separate module."""
    layer = {"attention": ("attn.in_proj_weight", "attn.in_proj_bias"), "out_name": "attn.out_proj",
             "mlp": ("mlp.c_fc", "mlp.c_proj"), "norms": ("ln_1", "ln_2")}
    text = "text." if custom else ""
    result = [
        Row("vision/patches/kernel", "visual.conv1.weight", CONV), Row("vision/class_token", "visual.class_embedding"),
        Row("vision/positions", "visual.positional_embedding"),
        *layers.layers("vision/encoder", "visual.transformer.resblocks.{}", **layer),
        *norm("vision/norm", "visual.ln_post"), Row("vision_projection/kernel", "visual.proj"),
        Row("text/tokens/embedding", f"{text}token_embedding.weight"),
        Row("text/positions", f"{text}positional_embedding"),
        *layers.layers("text/encoder", text + "transformer.resblocks.{}", **layer),
        *norm("text/norm", f"{text}ln_final"), Row("logit_scale", "logit_scale")]
    if clip.vision.pre_norm:
        result += norm("vision/pre_norm", "visual.ln_pre")
    if clip.text_projection_bias:
        result += dense("text_projection", f"{text}text_projection")
    else:
        result.append(Row("text_projection/kernel", f"{text}text_projection"))
    if clip.logit_bias is not None:
        result.append(Row("logit_bias", "logit_bias"))
    return result


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe a folder that open_clip loads. Raises `FileError` if open_clip has no such model."""
    config, pixels = task.model, task.pixels
    vision, text = config.vision, config.text
    expected = {"class_token": True, "position_class": True, "positions": "learned", "registers": 0,
                "patch_bias": False, "pre_logits": None, "distillation_token": False}
    odd = differing(vars(vision), expected, "vision.")
    pools = {ours: theirs for theirs, ours in (POOLS | TEXT_POOLS).items()}
    odd += [f"{name}.pool = {tower.pool!r}" for name, tower in (("vision", vision), ("text", text))
            if tower.pool not in pools]
    if not config.vision_projection:
        odd.append("vision_projection = False")
    if vision.transformer.activation != text.transformer.activation or vision.transformer.activation == "gelu_tanh":
        odd.append(f"activations {vision.transformer.activation}, {text.transformer.activation}")
    if odd:
        raise FileError(f"open_clip's own towers have no such thing: {', '.join(odd)}")

    def tower(stack, **fields):
        return {"layers": stack.depth, "width": stack.width, "mlp_ratio": stack.mlp_dim / stack.width,
                "norm_kwargs": {"eps": stack.eps}} | fields

    custom = config.logit_bias is not None or config.text_projection_bias or not text.causal
    model = {
        "embed_dim": config.embed_dim, "quick_gelu": vision.transformer.activation == "quick_gelu",
        "custom_text": custom,
        "vision_cfg": tower(vision.transformer, image_size=vision.image_size, patch_size=vision.patch,
                            head_width=vision.transformer.width // vision.transformer.heads,
                            pool_type=pools[vision.pool], no_ln_pre=not vision.pre_norm,
                            final_ln_after_pool=vision.norm_pooled),
        "text_cfg": tower(text.transformer, heads=text.transformer.heads, vocab_size=text.vocab_size,
                          context_length=text.context_length, no_causal_mask=not text.causal,
                          pool_type=pools[text.pool], proj_bias=config.text_projection_bias)}
    if text.pool == "eos" and text.eos_id == text.vocab_size - 1:
        model["text_cfg"]["pool_type"] = "argmax"  # the same, and known to older versions
    elif text.pool == "eos":
        model["text_cfg"]["eos_id"] = text.eos_id
    if not is_openai(tokenizer):
        model["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads the folder, whatever the name
    if config.logit_bias is not None:
        model |= {"init_logit_bias": config.logit_bias, "init_logit_scale": config.logit_scale}
    data = {"size": image.size, "mode": "RGB", "mean": list(pixels.mean), "std": list(pixels.std),
            "interpolation": image.interpolation, "fill_color": 0,
            "resize_mode": "squash" if image.eval_crop == "squash" else "shortest"}
    return Export(configs={"open_clip_config.json": {"model_cfg": model, "preprocess_cfg": data}},
                  rows=rows(config, custom=custom), weights="open_clip_model.safetensors")


def _side(size: Any) -> int:
    """Return the side of a square that is written as one number or two. Raises `FileError` for other shapes."""
    if isinstance(size, (list, tuple)):
        if len(set(size[-2:])) != 1:
            raise FileError(f"image size is {list(size)}; supported are squares")
        return size[-1]
    return size


def is_bare(tensors: Tensors) -> bool:
    """Return whether the names are those of OpenAI's and open_clip's own image towers."""
    return "visual.conv1.weight" in tensors or "visual.layer1.0.conv1.weight" in tensors


FAMILY = Family(
    name="open_clip", matches=lambda files, tensors: files.json("open_clip_config.json") is not None,
    read=lambda files, tensors: read(files.json("open_clip_config.json"), tensors), write=write,
    architecture=(CLIPConfig,))
OPENAI = Family(
    name="openai", read=lambda files, tensors: read_openai(tensors),
    matches=lambda files, tensors: is_bare(tensors))
