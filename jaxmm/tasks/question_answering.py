"""Visual question answering: BLIP encodes the question with the image and decodes the answer (Li et al. 2022, section
4.4)."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from jaxmm.losses.language_modeling import token_losses
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.task import Decoder, Task, check_pairs
from jaxmm.tasks.blip_common import BLIPTask, blip_decoder, check_tokenizer, with_vocabulary
from jaxmm.tasks.tower_task import TowerTask
from jaxmm.validation import BELOW_ONE, check_types, require


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(BLIPTask, TowerTask, Task):
    """BLIP for VQA. An image is encoded once for all its questions, a question once for all its weighted answers."""

    model: BLIPConfig
    pixels: Pixels = CLIP_PIXELS
    """Mean and std normalisation of images."""
    smoothing: Annotated[float, BELOW_ONE] = 0.1
    """Label smoothing of the answer tokens."""
    reads: ClassVar = ("image", "text", "answers")
    decomposes: ClassVar[bool] = True

    def __post_init__(self):
        """Check that the model encodes questions and decodes answers."""
        check_types(self, "task")
        text, answer = self.model.text, self.model.answer
        require(text.encoder and not text.decoder, "task.model.text.decoder", text.decoder,
                "False: task.model.answer writes")
        require(answer is not None and answer.decoder and not answer.encoder, "task.model.answer", answer,
                "a MedConfig with encoder=False")

    def bind(self, *, image_size, classes, tokenizer):
        """Set the vocabulary sizes of questions and answers to the tokenizer's plus [DEC] and [ENC], if the recipe has
        none."""
        check_pairs(image_size, self.model.vision, tokenizer)
        check_tokenizer(self.model.text, tokenizer)
        parts = {name: with_vocabulary(getattr(self.model, name), tokenizer, f"task.model.{name}")
                 for name in ("text", "answer")}
        return replace(self, model=replace(self.model, **parts))

    def encode(self, params, batch, rng):
        """Return per image the weighted sum of its answers' losses (mean over questions), and the numbers of correct
        and of all answer tokens."""
        model, answer = BLIP(self.model), self.model.answer
        rngs = [{"dropout": key} for key in jax.random.split(rng, 3)]
        tokens, images = batch["answers"], len(batch["image"])
        questions = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
        b, (a, t) = len(questions), tokens.shape[-2:]
        weights = batch["answer_weight"].reshape(b, a)
        require(t <= answer.positions, "data.tokenizer.answer_length", t,
                f"at most task.model.answer.positions = {answer.positions}")

        def run(method, *args, rngs, **options):
            return model.apply({"params": params}, *args, train=True, method=method, rngs=rngs, **options)

        image_tokens = run(BLIP.encode_image, self.pixels(batch["image"]), rngs=rngs[0])
        states = run(BLIP.encode_text_with_image, questions, image_tokens, rngs=rngs[1])
        tokens = tokens.reshape(b * a, t).at[:, 0].set(answer.decode_id)
        mask = jnp.repeat(questions != self.model.text.pad_id, a, axis=0)
        logits = run(BLIP.decode, tokens, jnp.repeat(states, a, axis=0), context_mask=mask, rngs=rngs[2])
        counts = (tokens != answer.pad_id) & (weights.reshape(-1, 1) > 0)
        losses = token_losses(logits, tokens, counts, self.smoothing).sum(axis=1).reshape(b, a)
        correct = (logits[:, :-1].argmax(axis=-1) == tokens[:, 1:]) & counts[:, 1:]
        losses = (losses * weights).sum(axis=1).reshape(images, -1).mean(axis=1)
        correct, total = (flags.reshape(images, -1).sum(axis=1) for flags in (correct, counts[:, 1:]))
        return {"loss": losses, "correct": correct, "total": total}

    def objective(self, params, outputs, batch):
        """Return the mean loss over images, and the accuracy of answer tokens."""
        accuracy = outputs["correct"].sum() / jnp.maximum(outputs["total"].sum(), 1)
        return outputs["loss"].mean(), {"accuracy": accuracy}

    @property
    def decoder(self) -> Decoder:
        """The decoder of answers."""
        return blip_decoder(self.model, self.pixels)
