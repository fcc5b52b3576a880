"""Run golden inputs through our model and the published implementation, and compare them layer by layer.

The published implementation (transformers, timm, open_clip) runs if it is installed, from the same local files.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.inference import parity_blip
from jaxmm.inference.model import Model, load
from jaxmm.inference.parity_blip import named
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig, TextTower
from jaxmm.models.vit import ViT, ViTConfig
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.io.hub import Files, find

Outputs = dict[str, np.ndarray]
"""Results of the parts of a model, by name, in order."""
GOLDEN = 2
"""Number of images, and of texts."""


@dataclass(frozen=True)
class Difference:
    """The difference between ours and theirs at one place."""

    name: str
    largest: float
    """Largest absolute difference, fp32."""
    scale: float
    """Largest absolute value of theirs."""


def golden_inputs(config: ViTConfig | CLIPConfig | BLIPConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Return normalised images [2 s s 3] and token ids [2 t], the same on every call.

    The first text ends in the middle. For a model that answers, questions without padding and answers lie side by side.
    """
    rng = np.random.default_rng(2021)
    side = getattr(config, "vision", config).image_size
    images = rng.uniform(-2, 2, (GOLDEN, side, side, 3)).astype(np.float32)
    tokens = {ViTConfig: lambda *_: None, CLIPConfig: _clip_tokens, BLIPConfig: parity_blip.golden_tokens}
    return images, tokens[type(config)](config, rng, GOLDEN)


def _clip_tokens(config: CLIPConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    text = config.text
    end = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    tokens = rng.integers(2, text.vocab_size - 2, (count, text.context_length)).astype(np.int32)
    tokens[tokens == end] = 2
    half = text.context_length // 2
    tokens[0, half:] = 1 if text.pool == "last" else 0
    tokens[0, half] = tokens[1, -1] = end
    return tokens


def _vit(model: Model, images: np.ndarray, tokens: None) -> dict[str, Any]:
    """Return every layer's tokens, and logits or pooled features."""
    out = _vision(model.config, model.params, images)
    name, last = ("logits", out.logits) if model.config.classes else ("features", out.pooled)
    return named("vision", out.hidden) | {name: last}


def _clip(model: Model, images: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Return every layer's tokens in both towers, embeddings and logits."""
    config, params = model.config, model.params
    layers = named("vision", _vision(config.vision, params["vision"], images).hidden)
    text = jax.jit(lambda p, ids: TextTower(config.text).apply({"params": p}, ids, train=False, hidden=True))
    layers |= named("text", text(params["text"], jnp.asarray(tokens)).hidden)
    out = jax.jit(lambda p, image, ids: model.module.apply({"params": p}, image, ids, train=False))(
        params, jnp.asarray(images), jnp.asarray(tokens))
    return layers | {"image embedding": out.image, "text embedding": out.text,
                     "logits": out.logit_scale * out.image @ out.text.T + out.logit_bias}


def _vision(config: ViTConfig, params: Any, images: np.ndarray) -> Any:
    return jax.jit(lambda p, x: ViT(config).apply({"params": p}, x, train=False, hidden=True))(params, images)


def _blip(model: Model, images: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    return parity_blip.ours(model.config, model.params, images, tokens)


OURS: dict[type, Callable[..., dict[str, Any]]] = {ViTConfig: _vit, CLIPConfig: _clip, BLIPConfig: _blip}


def compare(source: str | Path, *, revision: str | None = None) -> tuple[list[Difference], Outputs, str]:
    """Return the differences in order, our results, and the library compared with or the reason why there is none.

    Raises `FileError`.
    """
    model = load(source, revision=revision)
    config = model.config
    if type(config) not in OURS or getattr(config, "pair", False):
        raise FileError(f"{source} is a {type(config).__name__}; compared are ViT, CLIP, SigLIP, and BLIP for "
                        "captioning, matching or question answering")
    images, tokens = golden_inputs(config)
    computed = _arrays(OURS[type(config)](model, images, tokens))
    files = find(source, revision=revision)
    run, library = _published(files)
    if run is None or importlib.util.find_spec(library) is None or importlib.util.find_spec("torch") is None:
        return [], computed, f"{library} is not installed" if run else library
    theirs = run(files.folder, images.transpose(0, 3, 1, 2), tokens)
    return list(differences(computed, theirs)), computed, library


def differences(ours: Outputs, theirs: Mapping[str, np.ndarray]) -> Iterator[Difference]:
    """Compare all that both name. Raises `FileError` if shapes differ or no name is shared."""
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise FileError("the published implementation computes nothing of what jaxmm does")
    for name in shared:
        if ours[name].shape != theirs[name].shape:
            raise FileError(f"{name} is {ours[name].shape} here and {theirs[name].shape} there")
        yield Difference(name, float(np.abs(ours[name] - theirs[name]).max()), float(np.abs(theirs[name]).max()))


def _published(files: Files) -> tuple[Callable[..., Outputs] | None, str]:
    """Return the function that runs the published implementation and its library; None and a reason without one."""
    if files.json("open_clip_config.json") is not None:
        return _open_clip, "open_clip"
    config = files.json("config.json") or {}
    if "model_type" in config:
        return _transformers, "transformers"
    if "architecture" in config:
        return _timm, "timm"
    return None, "no library that can be installed reads these files"


def _transformers(folder: Path, images: np.ndarray, tokens: np.ndarray | None) -> Outputs:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    model, pixels = kind.from_pretrained(folder, dtype=torch.float32).eval(), torch.from_numpy(images)
    ids = None if tokens is None else torch.from_numpy(tokens).long()
    with torch.no_grad():
        if config.model_type == "blip":
            return _arrays(parity_blip.theirs(model, pixels, ids))
        if ids is None:
            out = model(pixels, output_hidden_states=True)
            layers = named("vision", out.hidden_states[1:config.num_hidden_layers])
            if hasattr(out, "logits"):
                return _arrays(layers | {"logits": out.logits})
            pooled = getattr(out, "pooler_output", None)
            return _arrays(layers | ({} if pooled is None else {"features": pooled}))
        vision = model.vision_model(pixels, output_hidden_states=True)
        text = model.text_model(ids, output_hidden_states=True)
        out = model(pixel_values=pixels, input_ids=ids)
    return _arrays(named("vision", vision.hidden_states[1:config.vision_config.num_hidden_layers])
                   | named("text", text.hidden_states[1:config.text_config.num_hidden_layers])
                   | {"image embedding": out.image_embeds, "text embedding": out.text_embeds,
                      "logits": out.logits_per_image})


def _timm(folder: Path, images: np.ndarray, tokens: None) -> Outputs:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    outputs: dict[str, Any] = {}
    _record(outputs, "vision", model.blocks)
    with torch.no_grad():
        out = model(torch.from_numpy(images))
    return _arrays(outputs | {"logits" if model.num_classes else "features": out})


def _open_clip(folder: Path, images: np.ndarray, tokens: np.ndarray) -> Outputs:
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    outputs: dict[str, Any] = {}
    _record(outputs, "vision", model.visual.transformer.resblocks)
    _record(outputs, "text", getattr(model, "text", model).transformer.resblocks)
    with torch.no_grad():
        image, text, scale, *bias = model(torch.from_numpy(images), torch.from_numpy(tokens).long())
    logits = scale * image @ text.T + (bias[0] if bias else 0.0)
    return _arrays(outputs | {"image embedding": image, "text embedding": text, "logits": logits})


def _record(outputs: dict[str, Any], tower: str, blocks: Iterable[Any]) -> None:
    """Make torch modules store their results in `outputs`."""
    for i, block in enumerate(blocks):
        block.register_forward_hook(
            lambda _, inputs, out, name=f"{tower} layer {i + 1}": outputs.update({name: out}))


def _arrays(outputs: Mapping[str, Any]) -> Outputs:
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}
