"""Tasks whose models compile in a second, and batches for them."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_classification import Classification
from tests.reference import random_like

B, CLASSES = 8, 5
STACK = TransformerConfig(width=12, depth=1, heads=3, mlp_dim=20, eps=1e-4)
VISION = ViTConfig(transformer=STACK, image_size=6, patch=3)
TEXT = TextConfig(transformer=replace(STACK, width=8, heads=2), vocab_size=11, context_length=7)
CLASSIFY = Classification(model=replace(VISION, classes=CLASSES))
SOFTMAX = ContrastiveLearning(model=CLIPConfig(vision=VISION, text=TEXT, embed_dim=10))
SIGMOID = ContrastiveLearning(kind="sigmoid", model=CLIPConfig(
    vision=replace(VISION, pool="map", class_token=False), text=replace(TEXT, causal=False, pool="last"), embed_dim=12,
    vision_projection=False, text_projection_bias=True, logit_scale=math.log(10), logit_bias=-2.0))


def bf16(task):
    """The same task with bf16 activations in every tower."""
    def half(tower):
        return replace(tower, transformer=replace(tower.transformer, dtype="bfloat16"))
    if isinstance(task, Classification):
        return replace(task, model=half(task.model))
    return replace(task, model=replace(task.model, vision=half(task.model.vision), text=half(task.model.text)))


def labelled():
    rng = np.random.default_rng(3)
    return {"image": jnp.asarray(rng.integers(0, 256, (B, 6, 6, 3)), jnp.uint8),
            "label": jnp.asarray(rng.integers(0, CLASSES, B), jnp.int32)}


def pairs(captions=1):
    """0 and 5 are crops of the same picture, 2 and 7 have the same words: neighbours in no microbatch.

    Of several captions, it is the last one that 7 shares with the first one of 2.
    """
    rng = np.random.default_rng(4)
    several = (captions,) if captions > 1 else ()
    image, tokens = rng.integers(0, 256, (B, 6, 6, 3)), rng.integers(0, 11, (B, *several, 7))
    image_id = np.stack([np.arange(B), np.arange(B) + 50], axis=1)
    text_id = np.stack([np.arange(B * captions), np.arange(B * captions) + 50], axis=1) + 7
    image_id[5], text_id[8 * captions - 1] = image_id[0], text_id[2 * captions]
    text_id = text_id.reshape(B, *several, 2)
    return {"image": jnp.asarray(image, jnp.uint8), "tokens": jnp.asarray(tokens, jnp.int32),
            "image_id": jnp.asarray(image_id, jnp.int32), "text_id": jnp.asarray(text_id, jnp.int32)}


@cache
def params(task):
    """Random parameters; the scale of the logits where training has it."""
    tree = random_like(jax.eval_shape(task.init, jax.random.key(0)))
    if "logit_scale" in tree:
        tree["logit_scale"] = jnp.float32(1.5)
    if "logit_bias" in tree:
        tree["logit_bias"] = jnp.float32(-2.0)
    return tree
