"""transformers' ImageGPT (versions 4 and 5): a GPT-2 with zero biases, whose start token is the last row of its table.

The processor's `clusters` are the palette.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.families.transformers import PREPROCESSOR, preprocessor
from jaxmm.pretrained.family import Checkpoint, Export, Family, known, unsupported
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import PARTS
from jaxmm.pretrained.table import SAME, TRANSPOSED, Row, matrix
from jaxmm.task import Task
from jaxmm.tasks.generative_pretraining import GenerativePretraining

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
DEFAULTS = {"vocab_size": 513, "n_positions": 1024, "n_embd": 512, "n_layer": 24, "n_head": 8, "n_inner": None,
            "activation_function": "quick_gelu", "layer_norm_epsilon": 1e-5}
SUPPORTED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": False,
             "add_cross_attention": False}
CLASS = "ImageGPTForCausalImageModeling"
LAYER = "transformer.h.{}"
BUFFERS = r"\.attn\.(bias|masked_bias)$"
BIASES = re.compile(r"\.(c_attn|c_proj|c_fc)\.bias$")
NOTE = ("features are OpenAI's, of the start token and all pixels but the last; transformers' ImageGPTModel reads all "
        "pixels without the start token, one position early")


def read(config: Mapping[str, Any], tensors: Tensors, processor: Mapping[str, Any] | None) -> Checkpoint:
    """Describe a folder of ImageGPTForCausalImageModeling. Raises `FileError` for what is not supported."""
    full = DEFAULTS | config
    unsupported(config, SUPPORTED, "config.json")
    if "lm_head.weight" not in tensors:
        raise FileError(f"this ImageGPT has no lm_head.weight; expected the class {CLASS}")
    side = math.isqrt(full["n_positions"])
    if side**2 != full["n_positions"]:
        raise FileError(f"n_positions is {full['n_positions']}; expected the number of pixels of a square image")
    if odd := [key for key in tensors if BIASES.search(key) and np.any(tensors[key].read())]:
        raise FileError(f"{len(odd)} biases are not zero, such as {odd[0]}; expected zeros: iGPT has no biases")
    model = IGPTConfig(
        transformer=TransformerConfig(
            width=full["n_embd"], depth=full["n_layer"], heads=full["n_head"], eps=full["layer_norm_epsilon"],
            mlp_dim=full["n_inner"] or 4 * full["n_embd"], init="igpt",
            activation=known(ACTIVATIONS, full["activation_function"], "activation_function")),
        image_size=side, colors=full["vocab_size"] - 1)
    image, palette = read_processor(processor, model)
    return Checkpoint(task=GenerativePretraining(model=model, palette=palette), rows=rows(), image=image,
                      ignore=(BUFFERS, BIASES.pattern), notes=(NOTE,))


def read_processor(processor: Mapping[str, Any] | None, model: IGPTConfig) -> tuple[ImageConfig, Palette]:
    """Return preprocessing and palette. Raises `FileError` if they are missing or do not fit the model."""
    clusters = np.asarray((processor or {}).get("clusters") or (), np.float64)
    if clusters.shape != (model.colors, 3):
        raise FileError(f"{PREPROCESSOR} has clusters of shape {list(clusters.shape)}; expected the palette of the "
                        f"model's {model.colors} colours, [{model.colors}, 3]")
    size = processor.get("size", {"height": 256, "width": 256})
    sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
    if sides != {model.image_size}:
        raise FileError(f"{PREPROCESSOR} has size {size}; expected {model.image_size}, for the model's "
                        f"{model.pixels} positions")
    interpolation = known({2: "bilinear", 3: "bicubic"}, processor.get("resample", 2), "resample")
    return (ImageConfig(size=model.image_size, eval_crop="squash", interpolation=interpolation),
            Palette(colors=tuple(map(tuple, clusters.tolist()))))


def rows() -> list[Row]:
    """Return the rows of ImageGPTForCausalImageModeling. Its matrices are [in out], except for the last one."""
    block = "blocks"
    return [
        Row("tokens/embedding", "transformer.wte.weight"), Row("positions", "transformer.wpe.weight"),
        *(Row(f"{block}/attention/{name}/kernel", f"{LAYER}.attn.c_attn.weight", matrix(), part, len(PARTS), axis=1)
          for part, name in enumerate(PARTS)),
        Row(f"{block}/attention/out/kernel", f"{LAYER}.attn.c_proj.weight", matrix(2)),
        Row(f"{block}/attention_norm/scale", f"{LAYER}.ln_1.weight"),
        Row(f"{block}/mlp_norm/scale", f"{LAYER}.ln_2.weight"),
        Row(f"{block}/mlp/up/kernel", f"{LAYER}.mlp.c_fc.weight", SAME),
        Row(f"{block}/mlp/down/kernel", f"{LAYER}.mlp.c_proj.weight", SAME),
        Row("norm/scale", "transformer.ln_f.weight"), Row("head/kernel", "lm_head.weight", TRANSPOSED)]


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe a folder that transformers loads. Raises `FileError` for what its class cannot hold."""
    model, stack = task.model, task.model.transformer
    if model.classes is not None or task.kind != "autoregressive":
        raise FileError(f"transformers has no such iGPT: expected one that writes images and has no classes; this has "
                        f"kind = {task.kind!r}, classes = {model.classes}")
    if task.palette is None or image.eval_crop != "squash" or image.eval_resize != 1:
        raise FileError("transformers has no such preprocessing: expected a palette and images that are squashed; this "
                        f"has {'a' if task.palette else 'no'} palette, eval_crop = {image.eval_crop!r}, eval_resize = "
                        f"{image.eval_resize}")
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[stack.activation]
    config = SUPPORTED | {
        "model_type": "imagegpt", "architectures": [CLASS], "vocab_size": model.colors + 1, "n_positions": model.pixels,
        "n_embd": stack.width, "n_layer": stack.depth, "n_head": stack.heads, "n_inner": stack.mlp_dim,
        "activation_function": activation, "layer_norm_epsilon": stack.eps, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0}
    processor = {
        "image_processor_type": "ImageGPTImageProcessor", "clusters": [list(color) for color in task.palette.colors],
        "size": {"height": model.image_size, "width": model.image_size}, "do_resize": True, "do_normalize": True,
        "do_color_quantize": True, "resample": {"bilinear": 2, "bicubic": 3}[image.interpolation]}
    sizes = {"attn.c_attn": 3 * stack.width, "attn.c_proj": stack.width, "mlp.c_fc": stack.mlp_dim,
             "mlp.c_proj": stack.width}
    zeros = {f"{LAYER.format(layer)}.{name}.bias": (size,) for layer in range(stack.depth)
             for name, size in sizes.items()}
    return Export(configs={"config.json": config, PREPROCESSOR: processor}, rows=rows(), zeros=zeros)


FAMILY = Family(
    name="transformers",
    matches=lambda files, tensors: (files.json("config.json") or {}).get("model_type") == "imagegpt",
    read=lambda files, tensors: read(files.json("config.json"), tensors, preprocessor(files)), write=write,
    architecture=(IGPTConfig,))
