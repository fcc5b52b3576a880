"""Words of captions, and what captions are measured by."""

import math

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from jaxmm.evals import caption_metrics as module
from jaxmm.evals.caption_metrics import METRICS, caption_metric_names, caption_metrics, java_version
from jaxmm.evals.ptb import ptb_tokens

# cut by PTBTokenizer 3.4.1
WORDS = {
    "A man's dog (brown) isn't here.": "a man 's dog -lrb- brown -rrb- is n't here",
    "Black-and-white t-shirt -- 50% off, $1,000.50!": "black-and-white t-shirt 50 % off $ 1,000.50",
    "The U.S. flag at 10:30am on St. John's Ave.": "the u.s. flag at 10:30 am on st. john 's ave.",
    "Plan K. The end": "plan k the end",
    "\"Cannot\" wait... what?! can't, gonna": "can not wait what ?! ca n't gon na",
    "it’s a “café” — naïve": "it 's a café naïve",
    "rock'n'roll at 8 o'clock, and/or the dogs' bowls": "rock 'n' roll at 8 o'clock and/or the dogs bowls",
    "no. 5 a dog,a cat.The 1/2": "no. 5 a dog a cat.the 1/2",
    "dog 🙂 #5 @home 3.5mm": "dog # 5 @home 3.5 mm",
    " \n\t...": "",
}


@pytest.fixture
def java(monkeypatch):
    """Sets the Java that is found."""
    def found(version):
        monkeypatch.setattr(module, "java_version", lambda: version)
        caption_metric_names.cache_clear()
    yield found
    caption_metric_names.cache_clear()


@pytest.mark.parametrize("text", WORDS)
def test_words(text):
    assert " ".join(ptb_tokens(text)) == WORDS[text]


@pytest.mark.skipif(java_version() is None, reason="no java: PTBTokenizer cannot run")
def test_words_are_those_of_ptbtokenizer():
    texts = {i: [{"caption": text}] for i, text in enumerate(WORDS)}
    assert PTBTokenizer().tokenize(texts) == {i: [" ".join(ptb_tokens(text))] for i, text in enumerate(WORDS)}


def test_values_by_hand(java, capsys):
    java(None)
    got = caption_metrics(["A dog runs.", "two cats"], [["a dog runs", "A dog!"], ["Three cats sit"]])
    assert tuple(got) == METRICS and capsys.readouterr().out == ""
    # 4 of 5 words, 2 of 3 pairs; 5 words against 6
    short = math.exp(1 - 6 / 5)
    assert got["bleu@1"] == pytest.approx(4 / 5 * short) and got["bleu@2"] == pytest.approx(
        math.sqrt(4 / 5 * 2 / 3) * short)
    precision, recall, beta = 1 / 2, 1 / 3, 1.2
    f = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert got["rouge_l"] == pytest.approx((1 + f) / 2)


def test_captions_without_words(java):
    java(None)
    texts = [["a dog", "..."], ["two cats sit here"], ["!"], []]
    got = caption_metrics(["", "two cats sit here", "x", "y"], texts)
    assert all(math.isfinite(value) for value in got.values()) and got["rouge_l"] == pytest.approx(0.5)
    assert got["cider"] == pytest.approx(5)                        # one of two pictures is right in every n-gram
    assert caption_metrics(["a dog"], [["a dog"]])["cider"] == 0
    assert caption_metrics(["", " "], [["a"], ["b"]])["bleu@4"] == pytest.approx(0, abs=1e-9)
    assert all(map(math.isnan, caption_metrics(["x"], [["?"]]).values()))


def test_names_depend_on_java(java, caplog, monkeypatch):
    java(None)
    assert caption_metric_names() == METRICS
    assert [r.getMessage() for r in caplog.records] == [
        f"{name} of captions is left out: no `java` that runs was found" for name in ("METEOR", "SPICE")]
    java(17)
    assert caption_metric_names() == (*METRICS, "meteor") and "this is Java 17" in caplog.text
    monkeypatch.setattr(module, "_spice_parser", lambda: False)
    java(11)
    assert caption_metric_names() == (*METRICS, "meteor") and "its parser is missing" in caplog.text
    monkeypatch.setattr(module, "_spice_parser", lambda: True)
    java(8)
    assert caption_metric_names() == (*METRICS, "meteor", "spice")


def test_without_the_extra_one_line_says_so(java, caplog, monkeypatch):
    java(8)
    monkeypatch.setattr(module, "has_extra", lambda extra: False)
    assert caption_metrics(["a dog"], [["a dog"]]) == {} and caption_metric_names() == ()
    assert len(caplog.records) == 1 and "pip install 'jaxmm[captions]'" in caplog.text
