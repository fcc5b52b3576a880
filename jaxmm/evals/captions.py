"""Captions that a model generates for held-out images, compared with the images' own captions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source, record_texts
from jaxmm.data.images import decode
from jaxmm.data.transforms import eval_image
from jaxmm.evals.by_image import original_records
from jaxmm.evals.caption_metrics import caption_metric_names, caption_metrics
from jaxmm.evals.context import CaptionExample, EvalContext, Outcomes, evenly_spaced
from jaxmm.inference.batching import padded_batch_size
from jaxmm.inference.captioning import (
    CAPTIONS,
    check_length,
    make_attention_map_fn,
    make_caption_fn,
    prompt_tokens,
    word_attention_maps,
)
from jaxmm.inference.generate import Decoding
from jaxmm.inference.result_files import result_id, write_results


@dataclass(frozen=True, kw_only=True)
class Captions(Evaluator):
    """Measures generated captions.

    `caption_exact` is the share of images whose caption is, word for word, one of their own, and `caption_score` the
    mean of the captions' scores (see `Generated.score`). For scenes, `caption_largest` is the share whose caption names
    colour and shape of the largest object, and `caption_true` the share of true captions. Then come COCO's metrics, as
    fractions of 1 except for CIDEr (see `jaxmm.evals.caption_metrics`): `bleu@1` to `bleu@4`, `rouge_l`, `cider`, and
    `meteor` and `spice` if Java can run them. Images without captions of their own count in the score only.
    """

    decoding: Decoding = field(default_factory=lambda: CAPTIONS)
    """Search or sampling of the captions' tokens."""
    prompt: str | None = None
    """Beginning of every caption; None: as in training."""
    limit: int | None = None
    """Number of images that are captioned, the first ones; None: all."""
    examples: int = 12
    """Images added to the report."""
    results: str | None = None
    """File for the captions in COCO's result format, a JSON list of `image_id` and `caption`; None: they are not
    written."""
    needs: ClassVar = ("writes captions",)
    reads_text: ClassVar = True

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the model has fewer positions than the longest caption."""
        check_length(self.decoding, context.task.decoder)

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        graded = ("caption_largest", "caption_true") if source.grades_captions else ()
        return ("caption_exact", "caption_score", *graded, *caption_metric_names())

    def measure(self, context: EvalContext, source: Source) -> Iterator[float]:
        """Yield the shares and scores."""
        source, tokenizer, decoder = context.sources.by_image(source), context.tokenizer, context.task.decoder
        prompt = prompt_tokens(tokenizer, decoder.prompt if self.prompt is None else self.prompt, decoder)
        tokens, scores = self._generate(context, source, prompt)
        captions = {i: tokenizer.decode(ids[prompt.shape[1]:]) for i, ids in tokens.items()}
        if self.results is not None:
            write_results(self.results, ({"image_id": result_id(source[i], "image_id"), "caption": caption}
                                         for i, caption in captions.items()))
        references = {i: record_texts(source, i) for i in captions}
        # a reference is compared as the tokenizer can spell it
        exact = {i: caption in set(map(tokenizer.decode, tokenizer(list(references[i]))))
                 for i, caption in captions.items() if references[i]}
        for i, image, words in self._attention_maps(context, source, tokens):
            context.examples.append(CaptionExample(image=image, caption=captions[i], right=exact.get(i, False),
                                                   truth=(*references[i], "")[0], words=words))
        rows = list(captions)
        context.outcomes.append(Outcomes(
            values={"caption_exact": np.array([exact.get(i, False) for i in rows])} if len(exact) == len(rows) else {},
            index=original_records(source, np.array(rows)),
            describe=lambda row: ((*references[rows[row]], "")[0], captions[rows[row]])))
        yield _mean(exact.values())
        yield _mean(scores)
        if source.grades_captions:
            yield _mean(source.names_largest(i, caption) for i, caption in captions.items())
            yield _mean(source.is_true(i, caption) for i, caption in captions.items())
        yield from caption_metrics(list(captions.values()), list(references.values())).values()

    def _generate(self, context: EvalContext, source: Source, prompt: np.ndarray
                  ) -> tuple[dict[int, np.ndarray], list[float]]:
        """Return the tokens of the first `limit` images' captions by record number, and their scores."""
        prompts = np.repeat(prompt, context.batch_size(self), axis=0)
        batches = (batch | {"prompt": prompts, "row": batch["index"].astype(np.int32)}
                   for batch in context.batches(self, source))
        generate, generated = make_caption_fn(context.task, self.decoding, 0, context.mesh), {}
        for result, batch in context.outputs(self, generate, batches):
            generated |= {index: (tokens[0], float(score[0])) for index, tokens, score in zip(
                batch["index"].tolist(), result["tokens"], result["score"], strict=True)}
            if self.limit is not None and len(generated) >= self.limit:
                break
        generated = dict(sorted(generated.items())[:self.limit])
        return {i: tokens for i, (tokens, _) in generated.items()}, [score for _, score in generated.values()]

    def _attention_maps(self, context: EvalContext, source: Source, tokens: dict[int, np.ndarray]
                        ) -> Iterator[tuple[int, np.ndarray, tuple]]:
        """Yield evenly spaced records: number, image as the model reads it, and each word with its attention map."""
        chosen = [sorted(tokens)[i] for i in evenly_spaced(len(tokens), self.examples)] if self.examples else []
        if not chosen:
            return
        size = padded_batch_size(len(chosen), context.mesh)
        rows = [chosen[min(row, len(chosen) - 1)] for row in range(size)]
        images = np.stack([eval_image(decode(source[i]["image"]), context.data.image) for i in rows])
        if context.task.decoder.attention is None:
            yield from ((i, image, ()) for i, image in zip(chosen, images, strict=False))
            return
        batch = {"image": images, "tokens": np.stack([tokens[i] for i in rows]), "mask": np.arange(size) < len(chosen)}
        (result, batch), = context.outputs(self, make_attention_map_fn(context.task, context.mesh), [batch])
        for i, image, ids, maps in zip(chosen, batch["image"], batch["tokens"], result["attention"], strict=True):
            yield i, image, tuple(word_attention_maps(context.tokenizer, ids[1:], maps[1:]))


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")
