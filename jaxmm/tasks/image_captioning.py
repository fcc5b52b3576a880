"""Image captioning: fine-tune BLIP's decoder (Li et al. 2022, section 4.3)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from jaxmm.losses.language_modeling import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.task import Decoder, Task, check_pairs
from jaxmm.tasks.blip_common import BLIPTask, blip_decoder, check_tokenizer, with_vocabulary
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import BELOW_ONE, check_types, require


@dataclass(frozen=True, kw_only=True)
class Captioning(BLIPTask, TowerTask, Task):
    """An image encoder and a text decoder that continues a fixed prompt."""

    model: BLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    prompt: str = "a picture of"
    """Beginning of every caption. It is given, not learned."""
    prompt_ids: tuple[int, ...] | None = None
    """Tokens of `prompt`; None: by the tokenizer of the run."""
    smoothing: Annotated[float, BELOW_ONE] = 0.1
    """Label smoothing of the caption tokens."""
    reads: ClassVar = ("image", "text")
    several_captions: ClassVar = True

    def __post_init__(self):
        """Check that the model has a decoder."""
        check_types(self, "task")
        require(self.model.text.decoder and self.model.answer is None, "task.model.text.decoder",
                self.model.text.decoder, "True, and no answer")

    def bind(self, *, image_size, classes, tokenizer):
        """Set the vocabulary size to the tokenizer's plus [DEC] and [ENC], if the recipe has none."""
        check_pairs(image_size, self.model.vision, tokenizer)
        ids = prompt_ids(tokenizer, self.prompt)
        check_tokenizer(self.model.text, tokenizer, ids)
        text = with_vocabulary(self.model.text, tokenizer)
        return replace(self, prompt_ids=ids, model=replace(self.model, text=text))

    def loss(self, params, extra, batch, rng):
        """Compute the cross-entropy of the tokens after the prompt, over all texts of the batch."""
        module, text, variables = self.module, self.model.text, {"params": params}
        first, second = ({"dropout": key} for key in jax.random.split(rng))
        image_tokens = module.apply(variables, self.pixels(batch["image"]), train=True, method=BLIP.encode_image,
                                    rngs=first)
        tokens, given = batch["tokens"].reshape(-1, batch["tokens"].shape[-1]), self.prompt_ids or ()
        start = jnp.broadcast_to(jnp.asarray((text.decode_id, *given), jnp.int32), (len(tokens), 1 + len(given)))
        tokens = jnp.concatenate([start, tokens[:, 1:]], axis=1)
        logits = module.apply(variables, tokens, image_tokens, train=True, method=BLIP.decode, rngs=second)
        counts = (tokens != text.pad_id) & (jnp.arange(tokens.shape[1]) > len(given))[None]
        loss = language_loss(logits, tokens, counts, self.smoothing, len(tokens) // len(image_tokens))
        right = (logits[:, :-1].argmax(axis=-1) == tokens[:, 1:]) & counts[:, 1:]
        return loss, (extra, {"accuracy": right.sum() / jnp.maximum(counts.sum(), 1)})

    @property
    def decoder(self) -> Decoder:
        """The decoder of captions."""
        return blip_decoder(self.model, self.pixels, self.prompt)


def prompt_ids(tokenizer, prompt: str) -> tuple[int, ...]:
    """Return all tokens of `prompt`, however long, without begin and end tokens."""
    row = tokenizer([prompt])[0].tolist()
    if row[-1] == tokenizer.eos_id and row.index(tokenizer.eos_id) == len(row) - 1:  # full: it may have been cut
        row = tokenizer.at_length(2 + 4 * len(prompt))([prompt])[0].tolist()  # as many as the bytes of UTF-8, and two
    return tuple(row[1:row.index(tokenizer.eos_id)]) if prompt else ()
