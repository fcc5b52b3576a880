"""Captions that a model writes of held-out pictures, against the ones that they have."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxmm.captioning import CAPTIONS, prompt_tokens, writer
from jaxmm.config import ConfigError, Evaluator
from jaxmm.data.pipeline import eval_batches
from jaxmm.data.sources import Source, record_texts
from jaxmm.evals.common import (
    EvalContext,
    PredictionExample,
    check,
    chosen_weights,
    outputs,
    spread,
    thumbnail,
    whole_batch,
)
from jaxmm.generate import Decoding
from jaxmm.models.blip import BLIPConfig


@dataclass(frozen=True, kw_only=True)
class Captions(Evaluator):
    """Yields `caption_exact`, the share of pictures whose caption is, word for word, one of those that they have, and
    `caption_score`, the mean of the captions' scores (see `jaxmm.generate.Written`)."""

    decoding: Decoding = field(default_factory=lambda: CAPTIONS)
    """How captions are written."""
    prompt: str | None = None
    """What they begin with; None: as in training."""
    limit: int | None = None
    """Pictures that are captioned, the first ones; None: all."""
    examples: int = 12
    """Pictures added to the report."""

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source = check(self, context, tokenizer=True)
        model = getattr(context.task, "model", None)
        if not isinstance(model, BLIPConfig) or not model.text.decoder:
            raise ConfigError(f"Captions asks for a model that writes; {type(context.task).__name__} does not")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return f"{self.prefix}/caption_exact", f"{self.prefix}/caption_score"

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, tokenizer, task = self.check(context), context.tokenizer, context.task
        prompt = getattr(task, "prompt", "") if self.prompt is None else self.prompt
        given = prompt_tokens(tokenizer, prompt, task.model.text.decode_id)
        size = whole_batch(self.batch_size, context.mesh)
        batches = (batch | {"prompt": np.repeat(given, size, axis=0), "row": batch["index"].astype(np.int32)}
                   for batch in eval_batches(source, context.data, size))
        fn = writer(task, self.decoding, 0, context.mesh)
        right, scores, written = [], [], {}
        for result, batch in outputs(fn, chosen_weights(self, context), batches, context.mesh):
            for tokens, score, index in zip(result["tokens"], result["score"], batch["index"].tolist(), strict=True):
                written[index] = tokenizer.decode(tokens[0][given.shape[1]:])
                right.append(written[index] in self._references(source, index, tokenizer))
                scores.append(float(score[0]))
            if self.limit is not None and len(right) >= self.limit:
                break
        indices = sorted(written)
        for i in spread(len(indices), self.examples) if self.examples else ():
            index = indices[i]
            context.examples.append(PredictionExample(
                image=thumbnail(source, index), truth=record_texts(source, index)[0],
                predictions=((written[index], float(np.exp(scores[i]))),)))
        yield f"{self.prefix}/caption_exact", float(np.mean(right)) if right else float("nan")
        yield f"{self.prefix}/caption_score", float(np.mean(scores)) if scores else float("nan")

    @staticmethod
    def _references(source: Source, index: int, tokenizer) -> set[str]:
        """The picture's captions as the model could have written them."""
        texts = record_texts(source, index)
        return {tokenizer.decode(row) for row in tokenizer(list(texts))}
