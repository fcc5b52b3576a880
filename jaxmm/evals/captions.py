"""Captions that a model writes of held-out pictures, against the ones that they have."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxmm.config import ConfigError, Evaluator
from jaxmm.data.base import Source, record_texts
from jaxmm.data.images import decode
from jaxmm.data.transforms import eval_image
from jaxmm.evals.caption_metrics import caption_metric_names, caption_metrics
from jaxmm.evals.context import (
    CaptionExample,
    EvalContext,
    check,
    chosen_source,
    chosen_weights,
    picture_batches,
    spread,
)
from jaxmm.inference.batching import outputs, padded_batch_size
from jaxmm.inference.captioning import (
    CAPTIONS,
    make_attention_map_fn,
    make_caption_fn,
    prompt_tokens,
    word_attention_maps,
)
from jaxmm.inference.generate import Decoding


@dataclass(frozen=True, kw_only=True)
class Captions(Evaluator):
    """Yields `caption_exact`, the share of pictures whose caption is, word for word, one of those that they have,
    `caption_score`, the mean of the captions' scores (see `Generated.score`), and for scenes `caption_largest`, the
    share whose caption names colour and shape of the largest object, and `caption_true`, the share that say what is
    so; then what COCO's captions are measured by, as fractions of 1 but CIDEr (see `jaxmm.evals.caption_metrics`):
    `bleu@1` to `bleu@4`, `rouge_l`, `cider`, and `meteor` and `spice` where there is a Java that runs them.

    Pictures without captions are captioned, and count in the score only.
    """

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
        if not context.task.writes_captions:
            raise ConfigError(f"Captions asks for a model that writes; {type(context.task).__name__} does not")
        return source

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        known = hasattr(chosen_source(self, context), "names_largest")
        names = ("exact", "score", "largest", "true") if known else ("exact", "score")
        return tuple(f"{self.prefix}/{name}" for name in (*(f"caption_{each}" for each in names),
                                                          *caption_metric_names()))

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, tokenizer, task = self.check(context), context.tokenizer, context.task
        prompt = task.decoder.prompt if self.prompt is None else self.prompt
        given = prompt_tokens(tokenizer, prompt, task.decoder)
        size = padded_batch_size(self.batch_size, context.mesh)
        batches = (batch | {"prompt": np.repeat(given, size, axis=0), "row": batch["index"].astype(np.int32)}
                   for batch in picture_batches(source, context, size))
        fn = make_caption_fn(task, self.decoding, 0, context.mesh)
        weights, found = chosen_weights(self, context), {}
        for result, batch in outputs(fn, weights, batches, context.mesh):
            found |= {index: (tokens[0], float(score[0])) for index, tokens, score in zip(
                batch["index"].tolist(), result["tokens"], result["score"], strict=True)}
            if self.limit is not None and len(found) >= self.limit:
                break
        found = dict(sorted(found.items())[:self.limit])
        written = {index: tokenizer.decode(tokens[given.shape[1]:]) for index, (tokens, _) in found.items()}
        known = {index: record_texts(source, index) for index in written}
        # compared as the model could have written them
        exact = {i: written[i] in set(map(tokenizer.decode, tokenizer(list(known[i])))) for i in written if known[i]}
        for i, image, words in self._looked(context, source, weights, {i: tokens for i, (tokens, _) in found.items()}):
            context.examples.append(CaptionExample(image=image, caption=written[i], right=exact.get(i, False),
                                                   truth=(*known[i], "")[0], words=words))
        measured = {"exact": list(exact.values()), "score": [score for _, score in found.values()]}
        if hasattr(source, "names_largest"):
            measured |= {"largest": [source.names_largest(i, text) for i, text in written.items()],
                         "true": [source.is_true(i, text) for i, text in written.items()]}
        for name, values in measured.items():
            yield f"{self.prefix}/caption_{name}", float(np.mean(values)) if values else float("nan")
        for name, value in caption_metrics(list(written.values()), list(known.values())).items():
            yield f"{self.prefix}/{name}", value

    def _looked(self, context, source, weights, written):
        """Of some pictures, spread over all: their number, the picture as the model saw it, and where each word
        looked."""
        chosen = [sorted(written)[i] for i in spread(len(written), self.examples)] if self.examples else []
        if not chosen:
            return
        size = padded_batch_size(len(chosen), context.mesh)
        rows = [chosen[min(row, len(chosen) - 1)] for row in range(size)]
        batch = {"image": np.stack([eval_image(decode(source[i]["image"]), context.data.image) for i in rows]),
                 "tokens": np.stack([written[i] for i in rows]), "mask": np.arange(size) < len(chosen)}
        if context.task.decoder.attention is None:
            yield from ((i, image, ()) for i, image in zip(chosen, batch["image"], strict=False))
            return
        (result, batch), = outputs(make_attention_map_fn(context.task, context.mesh), weights, [batch], context.mesh)
        for i, image, tokens, look in zip(chosen, batch["image"], batch["tokens"], result["attention"], strict=True):
            yield i, image, tuple(word_attention_maps(context.tokenizer, tokens[1:], look[1:]))
