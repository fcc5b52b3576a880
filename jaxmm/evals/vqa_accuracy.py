"""Answers to questions about held-out pictures, by the rules of VQA's official evaluation (Goyal et al. 2017)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from jaxmm.config import ConfigError, Evaluator, require
from jaxmm.data.base import Source
from jaxmm.data.sources.vqa import common_answers
from jaxmm.evals.context import (
    EvalContext,
    PredictionExample,
    check,
    chosen_weights,
    picture_batches,
    spread,
    thumbnail,
)
from jaxmm.inference.answering import ANSWERS, SHORTLIST, candidate_tokens, make_rank_fn
from jaxmm.inference.batching import outputs, padded_batch_size
from jaxmm.inference.captioning import make_caption_fn, prompt_tokens
from jaxmm.inference.generate import Decoding

NUMBERS = dict(zip(("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
                   map(str, (0, *range(11))), strict=True))
ARTICLES = ("a", "an", "the")
SIGNS = ";:/'[]\"()=+\\_><@`,?"
SHORT = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
"""Words with an apostrophe that the evaluation knows, where one of them was left out."""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1:]: word for word in SHORT.split() for i, sign in enumerate(word) if sign == "'"}
FEWEST = 4
"""Answers of which the subsets without one hold the three that make an answer right."""


@dataclass(frozen=True, kw_only=True)
class VQAAccuracy(Evaluator):
    """Yields `vqa_accuracy`, the mean of `accuracy_of` over the questions that have answers."""

    answers: str | None = "train"
    """What is chosen from: "train", the answers of the training source; or a file of one answer a line. None: answers
    are written freely."""
    limit: int = 3_128
    """Most frequent answers of the training source that are chosen from."""
    shortlist: int = SHORTLIST
    """Answers that are scored in full, those with the likeliest first token; at least as many as there are: exact."""
    smoothing: float = 0.0
    """Label smoothing of the scores; BLIP's code ranks with 0.1."""
    decoding: Decoding = field(default_factory=lambda: ANSWERS)
    """How answers are written freely."""
    questions: int | None = None
    """Questions that are answered, the first ones; None: all."""
    examples: int = 12
    """Questions added to the report."""

    def __post_init__(self):
        """Checks ranges."""
        super().__post_init__()
        for name in ("limit", "shortlist"):
            require(getattr(self, name) > 0, f"evals.{name}", getattr(self, name), "a positive number")
        require(0 <= self.smoothing < 1, "evals.smoothing", self.smoothing, "0 or more, below 1")

    def check(self, context: EvalContext) -> Source:
        """The source measured on; raises `ConfigError` where this cannot run."""
        source = check(self, context, tokenizer=True)
        if not context.task.answers_questions:
            raise ConfigError(f"VQAAccuracy asks for a model that answers; {type(context.task).__name__} does not")
        require(getattr(source, "most_answers", 0), "VQAAccuracy.source", source.name, "questions with answers (vqa:)")
        self.choices(context)
        return source

    def choices(self, context: EvalContext) -> list[str] | None:
        """What is chosen from; None: nothing. Raises `ConfigError`."""
        if self.answers is None:
            return None
        if self.answers == "train":
            require(getattr(context.train, "most_answers", 0), "VQAAccuracy.answers", self.answers,
                    "a run that trains on questions with answers, a file of one answer a line, or None")
            return common_answers(context.train, self.limit)
        try:
            lines = Path(self.answers).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"VQAAccuracy.answers is {self.answers!r}: {error.strerror}") from None
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        require(found, "VQAAccuracy.answers", self.answers, "a file with one answer a line; it has none")
        return found

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """The names that `run` yields."""
        return (f"{self.prefix}/vqa_accuracy",)

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yields metric names and values."""
        source, right, answered = self.check(context), [], {}
        for index, found in self._answer(source, context):
            if source.answers[index]:
                right.append(accuracy_of(found[0][0], source.answers[index]))
            answered[index] = found
            if self.questions is not None and len(answered) >= self.questions:
                break
        indices = sorted(answered)
        for index in (indices[i] for i in spread(len(indices), self.examples)) if self.examples else ():
            question, *answers = source.texts(index)
            context.examples.append(PredictionExample(
                image=thumbnail(source, index), truth=f"{question} — {', '.join(answers)}",
                predictions=tuple((answer, float(np.exp(score))) for answer, score in answered[index])))
        yield f"{self.prefix}/vqa_accuracy", float(np.mean(right)) if right else float("nan")

    def _answer(self, source: Source, context: EvalContext) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """The number of each question, and its best answers with their scores."""
        task, tokenizer, choices = context.task, context.tokenizer, self.choices(context)
        size = padded_batch_size(self.batch_size, context.mesh)
        batches = picture_batches(source, context, size, tokenizer)
        if choices is None:
            prompt = np.repeat(prompt_tokens(tokenizer, "", task.decoder), size, axis=0)
            batches = (batch | {"prompt": prompt, "row": batch["index"].astype(np.int32)} for batch in batches)
            fn = make_caption_fn(task, self.decoding, 0, context.mesh)
        else:
            candidates, given = candidate_tokens(tokenizer, choices, task.decoder)
            ranked = make_rank_fn(task, given, 3, self.shortlist, self.smoothing, context.mesh)
            fn = partial(ranked, candidates=candidates)
        for result, batch in outputs(fn, chosen_weights(self, context), batches, context.mesh):
            for row, index in enumerate(batch["index"].tolist()):
                texts = ([choices[i] for i in result["index"][row]] if choices is not None
                         else [tokenizer.decode(ids[1:]) for ids in result["tokens"][row]])
                yield index, list(zip(texts, result["score"][row].tolist(), strict=True))


def normalise_answer(text: str) -> str:
    """An answer as the evaluation compares it: lower case, without signs and articles, numbers as digits, apostrophes
    where they belong."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text)
    signs = {sign: "" if number or f"{sign} " in text or f" {sign}" in text else " " for sign in SIGNS}
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(signs)))
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy_of(answer: str, truth: Sequence[str]) -> float:
    """How right an answer is: the mean of min(1, matches / 3) over all subsets of `truth` without one.

    Of fewer than four true answers no subset holds three: then the share of them that it matches, which for one is
    whether they are equal. Both sides are normalised.
    """
    answer = normalise_answer(answer)
    matches = [normalise_answer(each) == answer for each in truth]
    if len(matches) < FEWEST:
        return sum(matches) / len(matches)
    return sum(min(1.0, (sum(matches) - each) / 3) for each in matches) / len(matches)
