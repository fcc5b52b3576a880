"""Official accuracies computed by hand, and the share of questions that a model answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig
from jaxmm.data.sources.registry import open_source
from jaxmm.evals import EvalContext, VQAAccuracy
from jaxmm.evals.vqa_accuracy import accuracy_of, normalise_answer
from jaxmm.inference.generate import Decoding
from jaxmm.validation import ConfigError
from tests.evals.conftest import MemorySource
from tests.pretrained import tiny

QUESTIONS = ["a small red?", "two green stars", "above a heart?", "a blue circle?", "large?"]
CHOICES = ["red", "a star", "blue", "two hearts"]


@pytest.mark.parametrize("text, want", [
    ("The Cat", "cat"), ("a an the", ""), ("Yes.", "yes"), ("2.5", "2.5"), ("two dogs", "2 dogs"), ("none", "0"),
    ("black/white", "black white"), ("black / white", "black white"), ("1,000", "1000"), ("1,000 (ish)", "1000 ish"),
    ("red,blue", "red blue"), ("red, blue", "red blue"), ("dont know", "don't know"), ("don't", "don t"),
    ("its o'clock ", "its o clock"), ("12 oclock", "12 o'clock"), ("t-shirt!", "t-shirt!"), ("what?\n", "what"),
    ("shouldntve", "shouldntve"), ("whats up", "what's up"), ("ten", "10"), ("somebody'd", "somebody d")])
def test_normalised(text, want):
    assert normalise_answer(text) == want


@pytest.mark.parametrize("answer, truth, want", [
    ("yes", ["yes"] * 10, 1.0), ("yes", ["no"] * 10, 0.0),
    ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),      # three subsets have two, seven have three
    ("yes", ["yes"] * 4 + ["no"] * 6, 1.0), ("yes", ["yes"] + ["no"] * 9, 9 * (1 / 3) / 10),
    ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10), ("2", ["two", "Two.", "2", "three"], 0.75),
    ("The cat", ["cat"], 1.0), ("dog", ["cat"], 0.0), ("cat", ["cat", "a dog"], 0.5), ("cat", ["cat"] * 3, 1.0)])
def test_accuracy(answer, truth, want):
    assert accuracy_of(answer, truth) == pytest.approx(want)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i, (picture, question) in enumerate(zip(tiny.pictures(5), QUESTIONS, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": question, "question_id": 70 + i,
                     "answers": CHOICES if i == 2 else [CHOICES[i % 4]]})
    rows[4]["answers"] = []
    (folder / "qa.json").write_text(json.dumps(rows))
    return open_source(f"vqa:{folder}/qa.json")


def context(source, **fields):
    model = tiny.answerer()
    return EvalContext(task=model.task, params=model.params, data=DataConfig(image=tiny.IMAGE), val=source,
                       tokenizer=tiny.TOKENIZER, **fields)


def answers(**options):
    """Return the model's answers, in the evaluator's batches of four, so that one program does for both."""
    images, answer = tiny.pictures(5), tiny.answerer().answer
    return [*answer(images[:4], QUESTIONS[:4], **options), answer(images[1:], QUESTIONS[1:], **options)[-1]]


def test_chosen_from_a_list(source, tmp_path):
    (tmp_path / "answers.txt").write_text("\n".join([*CHOICES, "", "red"]))
    evaluator = VQAAccuracy(answers=str(tmp_path / "answers.txt"), batch_size=4, examples=2,
                            results=str(tmp_path / "results.json"))
    run = context(source)
    got = dict(evaluator.run(run))
    answered = answers(choices=CHOICES, top=3)
    want = np.mean([accuracy_of(answered[i][0][0], source.answers(i)) for i in range(4)])
    assert got == {"val/vqa_accuracy": pytest.approx(want)} and tuple(got) == evaluator.metrics(run)
    assert json.loads((tmp_path / "results.json").read_text()) == [
        {"question_id": 70 + i, "answer": row[0][0]} for i, row in enumerate(answered)]
    assert [(example.truth, [text for text, _ in example.predictions]) for example in run.examples] == [
        ("a small red? — red", [text for text, _ in answered[0]]), ("large? — ", [text for text, _ in answered[4]])]
    run = context(source, train=source)
    assert VQAAccuracy().choices(run) == ["red", "a star", "two hearts", "blue"]
    assert VQAAccuracy(limit=2).choices(run) == ["red", "a star"]
    some = dict(VQAAccuracy(batch_size=4, questions=2, examples=0).run(run))
    assert some["val/vqa_accuracy"] == pytest.approx(
        np.mean([accuracy_of(answered[i][0][0], source.answers(i)) for i in range(2)]))


def test_written_freely(source):
    decoding = Decoding(beams=2, max_length=6)
    run = context(source)
    answered = answers(decoding=decoding, top=2)
    known = replace(source, answer_lists=[(answered[0][0][0],), ("x",), *source.answer_lists[2:]])
    got = dict(VQAAccuracy(answers=None, decoding=decoding, batch_size=4, examples=1).run(replace(run, val=known)))
    assert normalise_answer(answered[0][0][0]) and got["val/vqa_accuracy"] == pytest.approx(
        np.mean([accuracy_of(answered[i][0][0], known.answers(i)) for i in range(4)]))
    assert got["val/vqa_accuracy"] >= 0.25


def test_what_cannot_be_measured(source, tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    run = context(source)
    captions = MemorySource(images=tuple(tiny.pictures(2)), captions=(("a",), ("b",)))
    captioner = replace(run, task=tiny.CAPTIONER, params=tiny.captioner().params)
    for evaluator, where, message in (
            (VQAAccuracy(answers=None), captioner,
             "VQAAccuracy needs a task that answers questions; Captioning .*writes captions"),
            (VQAAccuracy(answers=None), context(captions), "source is 'memory'; expected questions with answers"),
            (VQAAccuracy(), run, "answers is 'train'; expected a run that trains on questions"),
            (VQAAccuracy(answers=str(tmp_path / "none.txt")), run, "one answer a line; it has none"),
            (VQAAccuracy(answers=str(tmp_path / "no.txt")), run, "no.txt': No such file")):
        with pytest.raises(ConfigError, match=message):
            evaluator.check(where)
