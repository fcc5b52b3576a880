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
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.embeddings import resize_positions
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.family import Opened
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.sharding import named_leaves, put_global, replicated, with_shardings
from jaxmm.task import Task

HOW_TRAINED = ("dropout", "attention_dropout", "drop_path", "dtype", "remat", "scan", "init")
"""Fields of a stack that say how it is computed and trained; the rest is the architecture."""
ANEW = re.compile(r"^(vision/)?(head|distillation_head|pre_logits)/")
"""What belongs to the old classes."""
CONTEXT = re.compile(r"^answer/blocks/cross_attention/(key|value)/kernel$")
"""What saw pictures and will see questions, whose width may be another (BLIP large)."""


def open_start(init: InitConfig) -> Opened:
    """The trained model that `init` names. Raises `ConfigError`."""
    try:
        return open_checkpoint(init.source, revision=init.revision)
    except FileError as error:
        raise ConfigError(f"init.from is {init.source!r}: {error}") from None


def adopt(task: Task, trained: Task, image_size: int) -> Task:
    """`task` with the architecture of `trained`, at `image_size`, and without its heads.

    A classifier takes the picture tower of CLIP or BLIP; these take a classifier's as theirs. BLIP keeps its own parts,
    and takes for each what another BLIP reads or writes with; to read two pictures, cross-attention to one becomes that
    to both. What only training sees (dropout, remat, dtype) stays that of `task`. Raises `ConfigError` where they have
    nothing in common.
    """
    ours, theirs = task.model, trained.model
    if isinstance(ours, ViTConfig):
        model = _tower(ours, getattr(theirs, "vision", theirs), image_size)
    elif isinstance(theirs, ViTConfig):
        model = replace(ours, vision=replace(_tower(ours.vision, theirs, image_size), distillation_head=False))
    elif isinstance(ours, BLIPConfig) or isinstance(theirs, BLIPConfig):
        require(type(ours) is type(theirs) and _common(ours, theirs), "init.from", type(trained).__name__,
                f"a ViT, or a BLIP that reads or writes as {type(task).__name__} does")
        model = _blip(ours, theirs, image_size)
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
    like = with_shardings(like, mesh)
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
    return put_global(np.asarray(new), replicated(mesh))


def _their_path(path: str, ours: Any, theirs: Any) -> str:
    """Where the model `theirs` has what `ours` has at `path`."""
    if not isinstance(ours, ViTConfig) and isinstance(theirs, ViTConfig):
        return path.removeprefix("vision/") if path.startswith("vision/") else ""
    if isinstance(ours, ViTConfig) and not isinstance(theirs, ViTConfig):
        return f"vision/{path}"
    part, _, rest = path.partition("/")
    if not isinstance(ours, BLIPConfig) or part not in ("text", "answer"):
        return path
    found = re.match(r"blocks/(causal_)?(attention|(?:first_|second_)?cross_attention|mlp)(_norm)?/", rest)
    mine = ours.text if part == "text" else ours.answer
    writes = not mine.encoder or rest.startswith("head/") or bool(found and found[1])
    if writes and theirs.answer is not None:
        return f"answer/{rest.replace('causal_', '', 1)}"
    if not (theirs.text.decoder if writes else theirs.text.encoder):
        return ""
    if found:
        name = found[2] if theirs.text.merge_from is not None else re.sub("^(first|second)_", "", found[2])
        own = writes and theirs.text.encoder and name in theirs.text.own
        rest = f"blocks/{'causal_' if own else ''}{name}{found[3] or ''}/{rest[found.end():]}"
    return f"text/{rest}"


def _common(ours: BLIPConfig, theirs: BLIPConfig) -> bool:
    """Whether both read texts, or both write."""
    writes = theirs.text.decoder or theirs.answer is not None
    if theirs.text.merge_from is not None and ours.text.merge_from is None:
        return False
    return (ours.text.encoder and theirs.text.encoder) or (bool(ours.text.decoder or ours.answer) and writes)


def _blip(ours: BLIPConfig, theirs: BLIPConfig, image_size: int) -> BLIPConfig:
    """The parts of `ours` with the sizes and the words of `theirs`."""
    def words(mine: MedConfig, other: MedConfig, **kept) -> MedConfig:
        both = mine.encoder and mine.decoder and other.encoder and other.decoder
        return replace(other, encoder=mine.encoder, decoder=mine.decoder, own=other.own if both else mine.own,
                       merge_from=mine.merge_from, transformer=_stack(mine.transformer, other.transformer), **kept)

    width = theirs.text.transformer.width
    answer = ours.answer and words(ours.answer, theirs.answer or theirs.text, context_width=width)
    return replace(ours, vision=_tower(ours.vision, theirs.vision, image_size), text=words(ours.text, theirs.text),
                   answer=answer, embed_dim=ours.embed_dim and (theirs.embed_dim or ours.embed_dim),
                   encode_token=theirs.encode_token)


def _tower(ours: ViTConfig, theirs: ViTConfig, image_size: int) -> ViTConfig:
    if image_size % theirs.patch:
        raise ConfigError(f"data.image.size is {image_size}; wanted a multiple of the trained model's patch = "
                          f"{theirs.patch}")
    return replace(theirs, transformer=_stack(ours.transformer, theirs.transformer), image_size=image_size,
                   patch_dropout=ours.patch_dropout, pre_logits=None, classes=None, head_init="zeros", head_bias=0.0)


def _stack(ours: TransformerConfig, theirs: TransformerConfig) -> TransformerConfig:
    return replace(theirs, **{name: getattr(ours, name) for name in HOW_TRAINED})
