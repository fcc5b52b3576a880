"""Training that starts from a trained model: whose architecture, which of its parameters, what is resized."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmm.config import ConfigError, InitConfig, require
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig
from jaxmm.models.med import TWINS, MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.embeddings import resize_positions
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.checkpoint import Opened
from jaxmm.pretrained.files import FileError
from jaxmm.pretrained.opening import open_checkpoint
from jaxmm.sharding import laid_out, named_leaves, replicated
from jaxmm.tasks.base import Task

HOW_TRAINED = ("dropout", "attention_dropout", "drop_path", "dtype", "remat", "scan", "init")
"""Fields of a stack that say how it is computed and trained; the rest is the architecture."""
ANEW = re.compile(r"^(vision/)?(head|distillation_head|pre_logits)/")
"""What belongs to the old classes."""
CONTEXT = re.compile(r"^answer/blocks/cross_attention/(key|value)/kernel$")
"""What saw pictures and will see questions, whose width may be another (BLIP large)."""
TWIN = re.compile(f"/({'|'.join(TWINS)})/")


def open_start(init: InitConfig) -> Opened:
    """The trained model that `init` names. Raises `ConfigError`."""
    try:
        return open_checkpoint(init.source, revision=init.revision)
    except FileError as error:
        raise ConfigError(f"init.from is {init.source!r}: {error}") from None


def adopt(task: Task, trained: Task, image_size: int) -> Task:
    """`task` with the architecture of `trained`, at `image_size`, and without its heads.

    A classifier takes the picture tower of CLIP or BLIP; these take a classifier's as theirs. What answers questions
    takes what another BLIP reads and writes with. BLIP that reads two pictures takes any BLIP that reads texts with
    one: its cross-attention becomes both of theirs. What only training sees (dropout, remat, dtype) stays that of
    `task`. Raises `ConfigError` where they have nothing in common.
    """
    ours, theirs = task.model, trained.model
    if isinstance(ours, ViTConfig):
        model = _tower(ours, getattr(theirs, "vision", theirs), image_size)
    elif isinstance(theirs, ViTConfig):
        model = replace(ours, vision=replace(_tower(ours.vision, theirs, image_size), distillation_head=False))
    elif isinstance(theirs, BLIPConfig) and theirs.answer is None and getattr(ours, "answer", None) is not None:
        text = replace(theirs.text, encoder=True, decoder=False, own=ours.text.own,
                       transformer=_stack(ours.text.transformer, theirs.text.transformer))
        answer = replace(text, encoder=False, decoder=True, context_width=text.transformer.width,
                         transformer=_stack(ours.answer.transformer, theirs.text.transformer))
        model = replace(ours, vision=_tower(ours.vision, theirs.vision, image_size), text=text, answer=answer)
    elif isinstance(ours, BLIPConfig) or isinstance(theirs, BLIPConfig):
        blips = type(ours) is type(theirs)
        doubled = blips and ours.pair and not theirs.pair and theirs.text.encoder
        require(doubled or (blips and _parts(ours) == _parts(theirs)), "init.from", type(trained).__name__,
                f"a ViT, or a model with the parts of {type(task).__name__}")
        text = replace(theirs.text, transformer=_stack(ours.text.transformer, theirs.text.transformer))
        answer = theirs.answer and replace(
            theirs.answer, transformer=_stack(ours.answer.transformer, theirs.answer.transformer))
        if doubled:
            text = replace(text, decoder=False, own=ours.text.own, merge_from=ours.text.merge_from)
        model = replace(ours if doubled else theirs, vision=_tower(ours.vision, theirs.vision, image_size), text=text,
                        answer=None if doubled else answer,
                        temperature=ours.temperature)
    else:
        text = replace(theirs.text, transformer=_stack(ours.text.transformer, theirs.text.transformer))
        model = replace(theirs, vision=_tower(ours.vision, theirs.vision, image_size), text=text,
                        logit_bias=None if ours.logit_bias is None else theirs.logit_bias or ours.logit_bias)
    return replace(task, model=model, pixels=trained.pixels)


def start_weights(init: InitConfig, task: Task, mesh: Mesh) -> tuple[Mapping[str, jax.Array], list[str]]:
    """What `task` starts from, by path, laid out over `mesh`; and the paths that start anew.

    Position tables are resized as the family does it. Raises `ConfigError`.
    """
    opened = open_start(init)
    like = jax.eval_shape(opened.task.init, jax.random.key(0))
    like = laid_out(like, mesh)
    try:
        found = dict(named_leaves(opened.read(like)))
    except FileError as error:
        raise ConfigError(f"init.from is {init.source!r}: {error}") from None
    skip = [ANEW, *map(re.compile, init.skip)]
    given, anew = {}, []
    for path, leaf in named_leaves(jax.eval_shape(task.init, jax.random.key(0))):
        theirs = found.get(_their_path(path, task.model, opened.task.model))
        if theirs is None or any(pattern.search(path) for pattern in skip):
            anew.append(path)
            continue
        if theirs.shape != leaf.shape and path.endswith("positions") and not path.startswith("text/"):
            theirs = _resized(theirs, task.model, opened, mesh)
        if theirs.shape != leaf.shape and CONTEXT.search(path):
            anew.append(path)
            continue
        if theirs.shape != leaf.shape:
            raise ConfigError(f"init.from is {init.source!r}, whose {path} is {list(theirs.shape)}; wanted "
                              f"{list(leaf.shape)}, or the path in init.skip")
        given[path] = theirs
    return given, anew


def _resized(table: jax.Array, model: ViTConfig | CLIPConfig | BLIPConfig, opened: Opened, mesh: Mesh) -> jax.Array:
    vision = getattr(model, "vision", model)
    prefix = int(vision.class_token and vision.position_class) + vision.distillation_token
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(table)
    new = resize_positions(whole, vision.grid, opened.resize, prefix=prefix)
    return jax.device_put(np.asarray(new), replicated(mesh))


def _their_path(path: str, ours: Any, theirs: Any) -> str:
    """Where the model `theirs` has what `ours` has at `path`."""
    if not isinstance(ours, ViTConfig) and isinstance(theirs, ViTConfig):
        return path.removeprefix("vision/") if path.startswith("vision/") else ""
    if isinstance(ours, ViTConfig) and not isinstance(theirs, ViTConfig):
        return f"vision/{path}"
    if getattr(ours, "answer", None) is not None and theirs.answer is None:
        return _before_answers(path, theirs.text)
    if isinstance(ours, BLIPConfig) and ours.pair and not theirs.pair:
        return TWIN.sub("/cross_attention/", path)
    return path


def _before_answers(path: str, text: MedConfig) -> str:
    """Where one text transformer has what `path` names of question encoder and answer decoder; "" for nowhere."""
    part, _, rest = path.partition("/")
    if part not in ("text", "answer"):
        return path
    if not (text.encoder if part == "text" else text.decoder):
        return ""
    found = re.match(r"blocks/(attention|cross_attention|mlp)(_norm)?/", rest)
    if part == "answer" and found and text.encoder and found[1] in text.own:
        rest = rest.replace("blocks/", "blocks/causal_", 1)
    return f"text/{rest}"


def _parts(model: BLIPConfig) -> tuple:
    """Which parts there are."""
    text = model.text
    return (text.encoder, text.decoder, text.own if text.encoder and text.decoder else None, model.answer is None,
            model.embed_dim, model.matching, text.merge_from)


def _tower(ours: ViTConfig, theirs: ViTConfig, image_size: int) -> ViTConfig:
    if image_size % theirs.patch:
        raise ConfigError(f"data.image.size is {image_size}; wanted a multiple of the trained model's patch = "
                          f"{theirs.patch}")
    return replace(theirs, transformer=_stack(ours.transformer, theirs.transformer), image_size=image_size,
                   patch_dropout=ours.patch_dropout, pre_logits=None, classes=None, head_init="zeros", head_bias=0.0)


def _stack(ours: TransformerConfig, theirs: TransformerConfig) -> TransformerConfig:
    return replace(theirs, **{name: getattr(ours, name) for name in HOW_TRAINED})
