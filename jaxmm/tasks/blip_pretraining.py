"""BLIP's pre-training (Li et al. 2022, section 3.2): contrast with a teacher and queues, matching, writing.

Without a decoder it is the fine-tuning for retrieval (section 4.1), which does not write.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmm.losses.blockwise import (
    NOT_IN_BATCH,
    Anchors,
    Candidates,
    Distilled,
    blockwise_loss,
    caption_keys,
    pair_keys,
)
from jaxmm.losses.contrastive import distilled_targets, positive_mask, soft_contrastive
from jaxmm.losses.image_text_matching import hard_negatives, matching_loss
from jaxmm.losses.language_modeling import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.sharding import batch_shards, constrain_batch, constrain_replicated
from jaxmm.task import Decoder, Embedder, Task, flat_ids
from jaxmm.tasks.blip_common import BLIPTask, blip_decoder, blip_embedder
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import BELOW_ONE, POSITIVE, Limit, at_least, check_types, count_steps, require

EMPTY_ID = -(2**31)
"""Id of an empty queue entry."""
MOMENTUM_PARTS = ("vision", "text", "vision_projection", "text_projection")
"""Parts of the model that the momentum encoder (the teacher) averages."""


@dataclass(frozen=True, kw_only=True)
class BLIPPretraining(BLIPTask, TowerTask, Task):
    """Contrastive, matching and captioning losses of one model; an image is encoded once for all three.

    With several captions per image, all are positives of their image in the contrastive loss, and the matching and
    captioning losses are means of the losses with one of them each. The queues keep the first caption.
    """

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
    matched: Annotated[int | None, POSITIVE] = None
    """Captions of an image that are matched, the first ones, if there are several; None: all. Matching is what costs
    most: it reads each of them three times."""
    reads: ClassVar = ("image", "text")
    several_captions: ClassVar = True
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
        model, tokens = BLIP(self.model), batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        b = len(batch["image"])
        self.check_batch(b)
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

        n = len(tokens) // b
        keys = [drawing] if n == 1 else jax.random.split(drawing, n)
        drawn = [self._draw_negatives(image, *texts, batch.get("image_id"), image_m, params["temperature"], key)
                 for *texts, key in zip(*(_by_caption(x, b, n) for x in (text, text_m, flat_ids(batch))), keys,
                                        strict=True)][:self.matched]
        matching, accuracy = self._match(variables, image_tokens, _by_caption(tokens, b, n)[:self.matched], drawn,
                                         rngs[2])
        metrics = {"contrastive": contrastive, "matching": matching, "match_accuracy": accuracy,
                   "temperature": params["temperature"], "alpha": jnp.asarray(alpha)}
        if self.model.text.decoder:
            captions = tokens.at[:, 0].set(self.model.text.decode_id)
            logits = model.apply(variables, captions, image_tokens, train=True, method=BLIP.decode, rngs=rngs[3])
            metrics["writing"] = language_loss(logits, captions, captions != self.model.text.pad_id, self.smoothing, n)

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
        masks = _positive_masks(batch, extra, len(image), len(text))
        similar = [_similar(x, y, temperature) for x, y in (
            (image, texts), (text, images), (image_m, texts), (text_m, images))]
        to_text, to_image, *teacher = similar
        losses = [soft_contrastive(logits, distilled_targets(targets, positive, alpha))
                  for logits, targets, positive in zip((to_text, to_image), teacher, masks, strict=True)]
        return sum(losses) / 2

    def _contrast_in_blocks(self, image, text, image_m, text_m, extra, batch, temperature, alpha):
        """Compute the contrastive loss blockwise, with batch and queue sharded over the devices."""
        require(self.queue % batch_shards() == 0, "task.queue", self.queue,
                f"a multiple of the {batch_shards()} devices that share it, with task.tile")
        keys = caption_keys((batch.get("image_id"), flat_ids(batch)), len(image), len(text))
        names = ["image_ids"] * ("image_id" in batch) + ["text_ids"] * ("text_id" in batch) * (len(text) // len(image))
        queued = pair_keys(tuple(extra[name] for name in names), jnp.full(self.queue, NOT_IN_BATCH))
        losses = [blockwise_loss(Distilled, Anchors((student, teacher), own),
                                 Candidates((new, extra[queue]), (other, queued)),
                                 1 / temperature, jnp.zeros(()), alpha, tile=self.tile)[0]
                  for student, teacher, own, new, other, queue in (
                      (image, image_m, keys[0], text_m, keys[1], "text_queue"),
                      (text, text_m, keys[1], image_m, keys[0], "image_queue"))]
        return sum(losses) / 2

    def _grouped(self, x: Array) -> Array:
        """Reshape [b ...] to the groups [b/n n ...] that negatives are drawn from, without moving rows."""
        x = x.reshape(-1, self.negatives or len(x), *x.shape[1:])
        return constrain_batch(x) if len(x) % batch_shards() == 0 else x

    def _draw_negatives(self, image, text, text_m, text_ids, image_ids, image_m, temperature, rng):
        """Draw a hard negative image for each text and a hard negative text for each image, among one caption each."""
        similar = [self._grouped(x) @ self._grouped(y).mT / temperature for x, y in ((text, image_m), (image, text_m))]
        ids = (None if x is None else self._grouped(x) for x in (image_ids, text_ids))
        positive = jnp.broadcast_to(positive_mask(*ids, size=similar[0].shape[-1]), similar[0].shape)
        return [hard_negatives(jax.lax.stop_gradient(logits), positive, key)
                for logits, key in zip(similar, jax.random.split(rng), strict=True)]

    def _match(self, variables, image_tokens, captions, drawn, rngs):
        """Compute the ITM loss over positives, texts with hard negative images, and images with hard negative texts.

        `captions` has the first captions of all images, then the second ones, and `drawn` their negatives. An image's
        own texts and its negative texts attend to it together, so only negative images move between devices.
        """
        take = jax.vmap(lambda x, places: x[places])
        other_tokens = [take(self._grouped(own), texts).reshape(own.shape)
                        for own, (_, (texts, _)) in zip(captions, drawn, strict=True)]
        other_images = [take(self._grouped(image_tokens), images).reshape(image_tokens.shape)
                        for (images, _), _ in drawn]

        b, n, (own, other) = len(image_tokens), len(drawn), jax.random.split(rngs["dropout"])
        match = partial(BLIP(self.model).apply, variables, train=True, method=BLIP.match)
        both = constrain_batch(jnp.stack([*captions, *other_tokens], axis=1).reshape(2 * n * b, -1))
        with_own = match(both, image_tokens, rngs={"dropout": own}).reshape(b, 2 * n, 2)
        others = constrain_batch(jnp.stack(other_images, axis=1).reshape(n * b, *image_tokens.shape[1:]))
        texts = constrain_batch(jnp.stack(captions, axis=1).reshape(n * b, -1))
        with_other = match(texts, others, rngs={"dropout": other}).reshape(b, n, 2)
        labels, results = jnp.repeat(jnp.asarray([1, 0, 0]), b), []
        for i, ((_, has_image), (_, has_text)) in enumerate(drawn):
            logits = jnp.concatenate([with_own[:, i], with_own[:, n + i], with_other[:, i]])
            counts = jnp.concatenate([jnp.ones(b, bool), has_text.ravel(), has_image.ravel()])
            results.append(matching_loss(logits, labels, counts))
        return tuple(sum(values) / n for values in zip(*results, strict=True))

    def _enqueue(self, extra, image, text, batch) -> dict[str, Any]:
        """Overwrite the oldest queue entries (ring buffer; the batch size need not divide the queue)."""
        b = len(image)
        places = (extra["place"] + jnp.arange(b)) % self.queue
        n, empty = len(text) // b, jnp.full((b, 2), EMPTY_ID, jnp.int32)
        new = {"image_queue": image, "image_ids": batch.get("image_id"),
               "text_queue": _by_caption(text, b, n)[0], "text_ids": _by_caption(flat_ids(batch), b, n)[0]}
        new = {name: empty if rows is None else rows for name, rows in new.items()}
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


def _by_caption(x: Array | None, images: int, captions: int) -> list[Array | None]:
    """Return the rows of `x` of the first caption of every image, then of the second, and so on.

    `x` has the captions of an image one after the other; without it, return as many None.
    """
    return [None] * captions if x is None else list(x.reshape(images, captions, *x.shape[1:]).swapaxes(0, 1))


def _positive_masks(
    batch: Mapping[str, Array], extra: Mapping[str, Any], images: int, texts: int
) -> tuple[Bool[Array, "b n"], Bool[Array, "c m"]]:
    """Return the masks of positives in batch and queue, of images and of texts: the same image, or the same text."""
    captions = texts // images
    own = positive_mask(batch.get("image_id"), flat_ids(batch), images, captions)
    queued = jnp.zeros((images, captions, len(extra["image_ids"])), bool)
    for name, stored in (("image_id", "image_ids"), ("text_id", "text_ids")):
        if name in batch:
            ids = batch[name].reshape(images, -1, 1, 2)
            queued = queued | (ids == extra[stored][None, None]).all(axis=-1)
    return (jnp.concatenate([own, queued.any(axis=1)], axis=1),
            jnp.concatenate([own.T, queued.reshape(texts, -1)], axis=1))
