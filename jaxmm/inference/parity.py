"""Is it the same model? Golden inputs through ours and through the published implementation, layer by layer.

The published one (transformers, timm, open_clip) runs where it is installed, from the same local files. It is imported
here only.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.inference import parity_blip
from jaxmm.inference.model import Model, load
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig
from jaxmm.models.vit import ViT, ViTConfig
from jaxmm.nn.attention import causal_mask
from jaxmm.nn.transformer import Stack
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.io.hub import Files, find

Outputs = dict[str, np.ndarray]
"""What each part of a model computes, by name, in order."""
GOLDEN = 2
"""Pictures, and texts."""


@dataclass(frozen=True)
class Difference:
    """Between ours and theirs at one place."""

    name: str
    largest: float
    """Largest absolute difference, fp32."""
    scale: float
    """Largest absolute value of theirs."""


def golden_inputs(model: ViTConfig | CLIPConfig | BLIPConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Normalised pictures [2 s s 3], and token ids [2 t], the first of which end in the middle: the same ones
    always. Of a model that answers, questions without padding and answers, side by side."""
    rng = np.random.default_rng(2021)
    vision = model if isinstance(model, ViTConfig) else model.vision
    pictures = rng.uniform(-2, 2, (GOLDEN, vision.image_size, vision.image_size, 3)).astype(np.float32)
    if vision is model:
        return pictures, None
    if isinstance(model, BLIPConfig):
        return pictures, parity_blip.golden_tokens(model, rng, GOLDEN)
    text = model.text
    end = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    tokens = rng.integers(2, text.vocab_size - 2, (GOLDEN, text.context_length)).astype(np.int32)
    tokens[tokens == end] = 2
    half = text.context_length // 2
    tokens[0, half:] = 1 if text.pool == "last" else 0
    tokens[0, half] = tokens[1, -1] = end
    return pictures, tokens


def ours(model: Model, pictures: np.ndarray, tokens: np.ndarray | None) -> Outputs:
    """Every layer's tokens, what is pooled, and logits or embeddings; of BLIP, what each mode makes of them."""
    if isinstance(model.config, BLIPConfig):
        return _arrays(parity_blip.ours(model.config, model.params, pictures, tokens))
    clip = isinstance(model.config, CLIPConfig)
    vision, params = (model.config.vision, model.params["vision"]) if clip else (model.config, model.params)
    seen = jax.jit(lambda p, x: ViT(vision).apply({"params": p}, x, train=False, hidden=True))(params, pictures)
    found = {f"vision layer {i + 1}": layer for i, layer in enumerate(seen.hidden)}
    if not clip:
        name, last = ("logits", seen.logits) if vision.classes else ("features", seen.pooled)
        return _arrays(found | {name: last})
    found |= {f"text layer {i + 1}": layer for i, layer in enumerate(text_layers(model, tokens))}
    raw = {"image": jnp.asarray(pictures), "tokens": jnp.asarray(tokens)}
    out = jax.jit(lambda p, b: model.module.apply({"params": p}, b["image"], b["tokens"], train=False))(
        model.params, raw)
    logits = out.logit_scale * out.image @ out.text.T + out.logit_bias
    return _arrays(found | {"image embedding": out.image, "text embedding": out.text, "logits": logits})


def text_layers(model: Model, tokens: np.ndarray) -> jax.Array:
    """Tokens after each layer of the text tower [l b t d]."""
    text, params = model.config.text, model.params["text"]

    @jax.jit
    def run(params, tokens):
        x = params["tokens"]["embedding"][tokens] + params["positions"][:tokens.shape[1]]
        mask = causal_mask(tokens.shape[1]) if text.causal else None
        return Stack(text.transformer).apply({"params": params["encoder"]}, x, mask, train=False, hidden=True).hidden

    return run(params, jnp.asarray(tokens))


def compare(source: str | Path, *, revision: str | None = None) -> tuple[list[Difference], Outputs, str]:
    """Differences at every place that both have, in order; what ours computes; and against what it was compared, or
    why it was not. Raises `FileError`."""
    model = load(source, revision=revision)
    config = model.config
    pair = isinstance(config, BLIPConfig) and config.pair
    if pair or not isinstance(config, (ViTConfig, CLIPConfig, BLIPConfig)):
        raise FileError(f"{source} is a {type(model.config).__name__}; compared are ViT, CLIP, SigLIP, and BLIP that "
                        "writes captions, matches or answers")
    pictures, tokens = golden_inputs(model.config)
    found = ours(model, pictures, tokens)
    files = find(source, revision=revision)
    run, library = _published(files)
    if run is None or importlib.util.find_spec(library) is None or importlib.util.find_spec("torch") is None:
        return [], found, f"{library} is not installed" if run else library
    theirs = run(files.folder, pictures.transpose(0, 3, 1, 2), tokens)
    return list(differences(found, theirs)), found, library


def differences(ours: Outputs, theirs: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """Of all that both name. Raises `FileError` where shapes differ or nothing is comparable."""
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise FileError("the published implementation computes nothing of what jaxmm does")
    for name in shared:
        if ours[name].shape != theirs[name].shape:
            raise FileError(f"{name} is {ours[name].shape} here and {theirs[name].shape} there")
        yield Difference(name, float(np.abs(ours[name] - theirs[name]).max()), float(np.abs(theirs[name]).max()))


def _published(files: Files) -> tuple[Callable[..., Outputs] | None, str]:
    """What runs the published implementation, and its library's name; None and why there is none."""
    if files.json("open_clip_config.json") is not None:
        return _open_clip, "open_clip"
    config = files.json("config.json") or {}
    if "model_type" in config:
        return _transformers, "transformers"
    if "architecture" in config:
        return _timm, "timm"
    return None, "no library that can be installed reads these files"


def _transformers(folder: Path, pictures: np.ndarray, tokens: np.ndarray | None) -> Outputs:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        if config.model_type == "blip":
            return _arrays(parity_blip.theirs(model, torch.from_numpy(pictures), torch.from_numpy(tokens).long()))
        if tokens is None:
            out = model(torch.from_numpy(pictures), output_hidden_states=True)
            found = _layers("vision", out.hidden_states, config.num_hidden_layers)
            if hasattr(out, "logits"):
                return _arrays(found | {"logits": out.logits})
            pooled = getattr(out, "pooler_output", None)
            return _arrays(found | ({} if pooled is None else {"features": pooled}))
        vision = model.vision_model(torch.from_numpy(pictures), output_hidden_states=True)
        words = torch.from_numpy(tokens).long()
        text = model.text_model(words, output_hidden_states=True)
        out = model(pixel_values=torch.from_numpy(pictures), input_ids=words)
    return _arrays(_layers("vision", vision.hidden_states, config.vision_config.num_hidden_layers)
                   | _layers("text", text.hidden_states, config.text_config.num_hidden_layers)
                   | {"image embedding": out.image_embeds, "text embedding": out.text_embeds,
                      "logits": out.logits_per_image})


def _layers(tower: str, hidden: Any, depth: int) -> dict[str, Any]:
    """By name; `hidden` begins with the layers' input, and the last may be behind the final norm."""
    return {f"{tower} layer {i}": hidden[i] for i in range(1, depth)}


def _timm(folder: Path, pictures: np.ndarray, tokens: None) -> Outputs:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    found: dict[str, Any] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, inputs, out, i=i: found.update({f"vision layer {i + 1}": out}))
    with torch.no_grad():
        out = model(torch.from_numpy(pictures))
    return _arrays(found | {"logits" if model.num_classes else "features": out})


def _open_clip(folder: Path, pictures: np.ndarray, tokens: np.ndarray) -> Outputs:
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    found: dict[str, Any] = {}
    for tower, stack in (("vision", model.visual.transformer),
                         ("text", getattr(model, "text", model).transformer)):
        for i, block in enumerate(stack.resblocks):
            block.register_forward_hook(
                lambda _, inputs, out, name=f"{tower} layer {i + 1}": found.update({name: out}))
    with torch.no_grad():
        image, text, scale, *bias = model(torch.from_numpy(pictures), torch.from_numpy(tokens).long())
    logits = scale * image @ text.T + (bias[0] if bias else 0.0)
    return _arrays(found | {"image embedding": image, "text embedding": text, "logits": logits})


def _arrays(found: Mapping[str, Any]) -> Outputs:
    return {name: np.asarray(value, np.float32) for name, value in found.items()}
