"""BLIP's pre-training (Li et al. 2022, section 3.2): contrast with a teacher and queues, matching, writing.

Without a decoder it is the fine-tuning for retrieval (section 4.1), which does not write.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmm.losses.blockwise import NOT_IN_BATCH, Anchors, Candidates, Distilled, blockwise_loss, pair_keys
from jaxmm.losses.contrastive import distilled_targets, equal_ids, positive_mask, soft_contrastive
from jaxmm.losses.image_text_matching import hard_negatives, matching_loss
from jaxmm.losses.language_modeling import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.sharding import batch_shards, constrain_batch, constrain_replicated
from jaxmm.task import Decoder, Embedder, Task
from jaxmm.tasks.blip_common import BLIPTask, blip_decoder, blip_embedder
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import BELOW_ONE, POSITIVE, Limit, at_least, check_types, count_steps, require

EMPTY_ID = -(2**31)
"""Id of an empty queue entry."""
MOMENTUM_PARTS = ("vision", "text", "vision_projection", "text_projection")
"""Parts of the model that the momentum encoder (the teacher) averages."""


@dataclass(frozen=True, kw_only=True)
class BLIPPretraining(BLIPTask, TowerTask, Task):
    """Contrastive, matching and captioning losses of one model; an image is encoded once for all three."""

    model: BLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    queue: Annotated[int, POSITIVE] = 57_600
    """q, number of earlier image and text embeddings that a batch is compared with in addition to its own."""
    momentum: Annotated[float, BELOW_ONE] = 0.995
    """Momentum of the teacher, a moving average of the student."""
    alpha: Annotated[float, BELOW_ONE] = 0.4
    """Share of the teacher's predictions in the targets of the contrastive loss."""
    ramp: Annotated[float, at_least(0)] = 0
    """Steps over which `alpha` grows from 0 (the paper's code: two epochs); below 1 a share of all steps."""
    smoothing: Annotated[float, BELOW_ONE] = 0.1
    """Label smoothing of the caption tokens."""
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the contrastive, matching and captioning losses. The paper's are 1. A short run from scratch writes
    better captions with a lower contrastive weight, because a low temperature makes that gradient large."""
    tile: Annotated[int | None, POSITIVE] = None
    """Block size of the blockwise contrastive loss over a ring of devices: at most `tile` x `tile` logits at a time;
    None: each device has the logits of its rows with the full queue."""
    negatives: Annotated[int | None, Limit("two or more pairs", lambda value: value > 1)] = None
    """Draw hard negatives within groups of this many consecutive pairs (the paper's pre-training: one GPU's batch).
    Groups that are local to a device need no all-gather of image tokens. None: from the global batch."""
    reads: ClassVar = ("image", "text")
    clamps: ClassVar = ((r"^temperature$", 0.001, 0.5),)

    def __post_init__(self):
        """Check the weights, and that the model has all three modes."""
        check_types(self, "task")
        model = self.model
        require(model.embed_dim and model.matching and model.answer is None, "task.model", model,
                "embed_dim, matching, and no answer")
        require(min(self.weights) >= 0 < max(self.weights), "task.weights", self.weights, "0 or more, one above 0")

    def bind(self, *, image_size, classes, tokenizer):
        """Check that there is a temperature, and set the vocabulary size if the recipe has none."""
        require(self.model.temperature is not None, "task.model.temperature", None, "a number to start from")
        return super().bind(image_size=image_size, classes=classes, tokenizer=tokenizer)

    def with_steps(self, steps: int) -> "BLIPPretraining":
        """Return this task with `ramp` as a number of steps."""
        return replace(self, ramp=count_steps(self.ramp, steps))

    def with_blockwise_loss(self, size):
        """Return this task with `tile` = `size`; None if it has a tile."""
        return replace(self, tile=size) if self.tile is None else None

    def check_batch(self, size):
        """Check that a batch of `size` fits into the queue and divides into groups of negatives."""
        require(size <= self.queue, "task.queue", self.queue, f"at least data.batch_size = {size}")
        require(size % (self.negatives or 1) == 0, "task.negatives", self.negatives,
                f"a divisor of data.batch_size = {size}")

    def init_extra(self, params, rng):
        """Return the teacher, a copy of the student, and queues of random directions without ids."""
        first, second = jax.random.split(rng)
        shape = self.queue, self.model.embed_dim

        def directions(key):
            x = jax.random.normal(key, shape)
            return x / jnp.linalg.norm(x, axis=1, keepdims=True)

        empty = jnp.full((self.queue, 2), EMPTY_ID, jnp.int32)
        return {"teacher": jax.tree.map(jnp.copy, {name: params[name] for name in MOMENTUM_PARTS}),
                "image_queue": directions(first), "text_queue": directions(second),
                "image_ids": empty, "text_ids": empty,
                "place": jnp.zeros((), jnp.int32), "step": jnp.zeros((), jnp.int32)}

    def loss(self, params, extra, batch, rng):
        """Compute the weighted sum of the three losses. The teacher is updated before use, the queues after."""
        model, tokens = BLIP(self.model), batch["tokens"]
        self.check_batch(len(tokens))
        dropout, drawing, teaching = jax.random.split(rng, 3)
        rngs = [{"dropout": key} for key in jax.random.split(dropout, 4)]
        variables = {"params": params}
        pixels = self.pixels(batch["image"])
        image_tokens = model.apply(variables, pixels, train=True, method=BLIP.encode_image, rngs=rngs[0])
        image = model.apply(variables, image_tokens, method=BLIP.project_image)
        text = model.apply(variables, tokens, train=True, method=BLIP.embed_text, rngs=rngs[1])

        teacher = jax.lax.stop_gradient(jax.tree.map(
            lambda old, new: self.momentum * old + (1 - self.momentum) * new, extra["teacher"],
            {name: params[name] for name in MOMENTUM_PARTS}))
        image_m, text_m = self._momentum_features(teacher, params, pixels, tokens, teaching)
        alpha = self.alpha * (jnp.minimum(1.0, extra["step"] / self.ramp) if self.ramp else 1.0)
        contrastive = self._contrast(image, text, image_m, text_m, extra, batch, params["temperature"],
                                     jnp.asarray(alpha))

        similar = [self._grouped(x) @ self._grouped(y).mT / params["temperature"]
                   for x, y in ((text, image_m), (image, text_m))]
        ids = (self._grouped(batch[name]) if name in batch else None for name in ("image_id", "text_id"))
        positive = jnp.broadcast_to(positive_mask(*ids, size=similar[0].shape[-1]), similar[0].shape)
        matching, accuracy = self._match(variables, image_tokens, tokens, similar, positive, drawing, rngs[2])
        metrics = {"contrastive": contrastive, "matching": matching, "match_accuracy": accuracy,
                   "temperature": params["temperature"], "alpha": jnp.asarray(alpha)}
        if self.model.text.decoder:
            captions = tokens.at[:, 0].set(self.model.text.decode_id)
            logits = model.apply(variables, captions, image_tokens, train=True, method=BLIP.decode, rngs=rngs[3])
            metrics["writing"] = language_loss(logits, captions, captions != self.model.text.pad_id, self.smoothing)

        extra = extra | self._enqueue(extra, image_m, text_m, batch) | {
            "teacher": teacher, "step": extra["step"] + 1}
        losses = contrastive, matching, metrics.get("writing", 0.0)
        return sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True)), (extra, metrics)

    def _momentum_features(self, teacher, params, pixels, tokens, rng):
        """Return the teacher's embeddings of the batch."""
        model, variables = BLIP(self.model), {"params": params | teacher}
        first, second = ({"dropout": key} for key in jax.random.split(rng))
        image_tokens = model.apply(variables, pixels, train=True, method=BLIP.encode_image, rngs=first)
        image = model.apply(variables, image_tokens, method=BLIP.project_image)
        text = model.apply(variables, tokens, train=True, method=BLIP.embed_text, rngs=second)
        return jax.lax.stop_gradient((image, text))

    def _contrast(self, image, text, image_m, text_m, extra, batch, temperature, alpha):
        """Compute the contrastive loss over batch and queues."""
        if self.tile is not None:
            return self._contrast_in_blocks(image, text, image_m, text_m, extra, batch, temperature, alpha)
        texts = jnp.concatenate([text_m, extra["text_queue"]])
        images = jnp.concatenate([image_m, extra["image_queue"]])
        positive = _positive_mask(batch, extra, len(image), self.queue)
        similar = [_similar(x, y, temperature) for x, y in (
            (image, texts), (text, images), (image_m, texts), (text_m, images))]
        to_text, to_image, *teacher = similar
        losses = [soft_contrastive(logits, distilled_targets(targets, positive, alpha))
                  for logits, targets in zip((to_text, to_image), teacher, strict=True)]
        return sum(losses) / 2

    def _contrast_in_blocks(self, image, text, image_m, text_m, extra, batch, temperature, alpha):
        """Compute the contrastive loss blockwise, with batch and queue sharded over the devices."""
        require(self.queue % batch_shards() == 0, "task.queue", self.queue,
                f"a multiple of the {batch_shards()} devices that share it, with task.tile")
        names = [name for name in ("image_id", "text_id") if name in batch]
        keys = pair_keys(tuple(batch[name] for name in names), jnp.arange(len(image)))
        queued = pair_keys(tuple(extra[f"{name}s"] for name in names), jnp.full(self.queue, NOT_IN_BATCH))
        losses = [blockwise_loss(Distilled, Anchors((student, teacher), keys),
                                 Candidates((new, extra[queue]), (keys, queued)),
                                 1 / temperature, jnp.zeros(()), alpha, tile=self.tile)[0]
                  for student, teacher, new, queue in ((image, image_m, text_m, "text_queue"),
                                                       (text, text_m, image_m, "image_queue"))]
        return sum(losses) / 2

    def _grouped(self, x: Array) -> Array:
        """Reshape [b ...] to the groups [b/n n ...] that negatives are drawn from, without moving rows."""
        x = x.reshape(-1, self.negatives or len(x), *x.shape[1:])
        return constrain_batch(x) if len(x) % batch_shards() == 0 else x

    def _match(self, variables, image_tokens, tokens, similar, positive, rng, rngs):
        """Compute the ITM loss over positives, texts with hard negative images, and images with hard negative texts.

        An image's own text and its negative text attend to it together, so only negative images move between devices.
        """
        drawn = [hard_negatives(jax.lax.stop_gradient(logits), positive, key)
                 for logits, key in zip(similar, jax.random.split(rng), strict=True)]
        (images, has_image), (texts, has_text) = drawn
        take = jax.vmap(lambda x, places: x[places])
        other_tokens = take(self._grouped(tokens), texts).reshape(tokens.shape)
        other_images = constrain_batch(take(self._grouped(image_tokens), images).reshape(image_tokens.shape))

        b, (own, other) = len(tokens), jax.random.split(rngs["dropout"])
        match = partial(BLIP(self.model).apply, variables, train=True, method=BLIP.match)
        both = constrain_batch(jnp.stack([tokens, other_tokens], axis=1).reshape(2 * b, -1))
        with_own = match(both, image_tokens, rngs={"dropout": own}).reshape(b, 2, 2)
        with_other = match(tokens, other_images, rngs={"dropout": other})
        logits = jnp.concatenate([with_own[:, 0], with_own[:, 1], with_other])
        labels = jnp.repeat(jnp.asarray([1, 0, 0]), b)
        counts = jnp.concatenate([jnp.ones(b, bool), has_text.ravel(), has_image.ravel()])
        return matching_loss(logits, labels, counts)

    def _enqueue(self, extra, image, text, batch) -> dict[str, Any]:
        """Overwrite the oldest queue entries (ring buffer; the batch size need not divide the queue)."""
        b = len(image)
        places = (extra["place"] + jnp.arange(b)) % self.queue
        new = {"image_queue": image, "text_queue": text, "image_ids": _ids(batch, "image_id", b),
               "text_ids": _ids(batch, "text_id", b)}
        return {name: extra[name].at[places].set(constrain_replicated(rows)) for name, rows in new.items()} | {
            "place": (extra["place"] + b) % self.queue}

    @property
    def embedder(self) -> Embedder:
        """Embeddings of images and texts."""
        return blip_embedder(self.model, self.pixels)

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of captions; None in the fine-tuning for retrieval."""
        return blip_decoder(self.model, self.pixels)


def _similar(rows: Float[Array, "b e"], columns: Float[Array, "n e"], temperature: Float[Array, ""]
             ) -> Float[Array, "b n"]:
    """Return the logits; rows stay sharded, columns are replicated."""
    return constrain_batch(constrain_batch(rows) @ constrain_replicated(columns).T / temperature)


def _ids(batch: Mapping[str, Array], name: str, size: int) -> Int[Array, "b 2"]:
    """Return the batch's ids; EMPTY_ID if it has none."""
    return batch[name] if name in batch else jnp.full((size, 2), EMPTY_ID, jnp.int32)


def _positive_mask(batch: Mapping[str, Array], extra: Mapping[str, Any], size: int, queue: int) -> Bool[Array, "b n"]:
    """Return the mask of positives in batch and queue: the same image, or the same text."""
    positive = jnp.concatenate([jnp.eye(size, dtype=bool), jnp.zeros((size, queue), bool)], axis=1)
    for name, queued in (("image_id", "image_ids"), ("text_id", "text_ids")):
        if name in batch:
            ids = batch[name]
            same = (ids[:, None] == extra[queued][None]).all(axis=-1)
            positive = positive | jnp.concatenate([equal_ids(ids), same], axis=1)
    return positive
