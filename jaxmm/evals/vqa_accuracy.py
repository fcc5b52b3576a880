"""Accuracy of answers to questions about held-out images, by VQA's official rules (Goyal et al. 2017)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.data.sources.vqa import common_answers
from jaxmm.evals.context import EvalContext, Outcomes, PredictionExample, evenly_spaced, thumbnail
from jaxmm.inference.answering import ANSWERS, SHORTLIST, candidate_tokens, make_rank_fn
from jaxmm.inference.captioning import check_length, make_caption_fn, prompt_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.inference.result_files import result_id, write_results
from jaxmm.paths import user_path
from jaxmm.validation import ConfigError, require

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
"""The official words with an apostrophe, by their spellings without one of the apostrophes."""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1:]: word for word in SHORT.split() for i, sign in enumerate(word) if sign == "'"}
MIN_ANSWERS = 4
"""Fewest true answers of which a subset without one has three, as many as make an answer fully right."""


@dataclass(frozen=True, kw_only=True)
class VQAAccuracy(Evaluator):
    """Measures `vqa_accuracy`, the mean of `accuracy_of` over the questions that have answers."""

    answers: str | None = "train"
    """Answers to choose from: "train", those of the training source, or a file with one answer per line. None: answers
    are generated freely."""
    limit: int = 3_128
    """Most frequent answers of the training source to choose from."""
    shortlist: int = SHORTLIST
    """Answers that are scored in full, those with the likeliest first token; exact if there are no more answers."""
    smoothing: float = 0.0
    """Label smoothing of the scores; BLIP's code ranks with 0.1."""
    decoding: Decoding = field(default_factory=lambda: ANSWERS)
    """Search or sampling of answers that are generated freely."""
    questions: int | None = None
    """Number of questions that are answered, the first ones; None: all."""
    examples: int = 12
    """Questions added to the report."""
    results: str | None = None
    """File for the answers in VQA's result format, a JSON list of `question_id` and `answer`; None: they are not
    written."""
    metric_names: ClassVar = ("vqa_accuracy",)
    needs: ClassVar = ("answers questions",)
    reads_text: ClassVar = True

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        for name in ("limit", "shortlist"):
            require(getattr(self, name) > 0, f"evals.{name}", getattr(self, name), "a positive number")
        require(0 <= self.smoothing < 1, "evals.smoothing", self.smoothing, "0 or more, below 1")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the source has no questions, or there are no answers to choose from."""
        require(source.most_answers, "VQAAccuracy.source", source.name, "questions with answers (vqa:)")
        if self.answers is None:
            check_length(self.decoding, context.task.decoder)
        self.choices(context)

    def choices(self, context: EvalContext) -> list[str] | None:
        """Return the answers to choose from; None: answers are generated freely. Raise `ConfigError` if there are none.
        """
        if self.answers is None:
            return None
        if self.answers == "train":
            require(context.train is not None and context.train.most_answers, "VQAAccuracy.answers", self.answers,
                    "a run that trains on questions with answers, a file of one answer a line, or None")
            return common_answers(context.train, self.limit)
        try:
            lines = user_path(self.answers, "answers").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"VQAAccuracy.answers is {self.answers!r}: {error.strerror}") from None
        choices = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        require(choices, "VQAAccuracy.answers", self.answers, "a file with one answer a line; it has none")
        return choices

    def measure(self, context: EvalContext, source: Source) -> tuple[float, ...]:
        """Return the accuracy."""
        accuracies, graded, answered = [], [], {}
        for index, ranked in self._answer(context, source):
            if answers := source.answers(index):
                accuracies.append(accuracy_of(ranked[0][0], answers))
                graded.append(index)
            answered[index] = ranked
            if self.questions is not None and len(answered) >= self.questions:
                break
        context.outcomes.append(Outcomes(
            values=dict.fromkeys(self.metric_names, np.array(accuracies)), index=np.array(graded, int),
            describe=lambda row: (" ".join(dict.fromkeys((source.texts(graded[row])[0], *source.answers(graded[row])))),
                                  answered[graded[row]][0][0])))
        indices = sorted(answered)
        if self.results is not None:
            write_results(self.results, ({"question_id": result_id(source[index], "question_id"),
                                          "answer": answered[index][0][0]} for index in indices))
        for index in (indices[i] for i in evenly_spaced(len(indices), self.examples)) if self.examples else ():
            question, *answers = source.texts(index)
            context.examples.append(PredictionExample(
                image=thumbnail(source, index), truth=f"{question} — {', '.join(answers)}",
                predictions=tuple((answer, float(np.exp(score))) for answer, score in answered[index])))
        return (float(np.mean(accuracies)) if accuracies else float("nan"),)

    def _answer(self, context: EvalContext, source: Source) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """Yield the number of each question, and its best answers with their scores."""
        task, tokenizer, choices = context.task, context.tokenizer, self.choices(context)
        batches = context.batches(self, source, tokenizer)
        if choices is None:
            prompts = np.repeat(prompt_tokens(tokenizer, "", task.decoder), context.batch_size(self), axis=0)
            batches = (batch | {"prompt": prompts, "row": batch["index"].astype(np.int32)} for batch in batches)
            fn = make_caption_fn(task, self.decoding, 0, context.mesh)
        else:
            candidates, given = candidate_tokens(tokenizer, choices, task.decoder)
            rank = make_rank_fn(task, given, 3, self.shortlist, self.smoothing, context.mesh)
            fn = partial(rank, candidates=candidates)
        for result, batch in context.outputs(self, fn, batches):
            for row, index in enumerate(batch["index"].tolist()):
                texts = ([choices[i] for i in result["index"][row]] if choices is not None
                         else [tokenizer.decode(ids[1:]) for ids in result["tokens"][row]])
                yield index, list(zip(texts, result["score"][row].tolist(), strict=True))


def normalise_answer(text: str) -> str:
    """Return an answer as the official evaluation compares it: lower case, no signs or articles, numbers as digits,
    apostrophes restored."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text)
    signs = {sign: "" if number or f"{sign} " in text or f" {sign}" in text else " " for sign in SIGNS}
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(signs)))
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy_of(answer: str, truth: Sequence[str]) -> float:
    """Return the accuracy of an answer: the mean of min(1, matches / 3) over all subsets of `truth` without one.

    With fewer than four true answers no subset has three; then it is the share of them that `answer` matches. Both
    sides are normalised.
    """
    answer = normalise_answer(answer)
    matches = [normalise_answer(reference) == answer for reference in truth]
    if len(matches) < MIN_ANSWERS:
        return sum(matches) / len(matches)
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)
