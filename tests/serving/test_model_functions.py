"""Requests that are computed together get the answers that they get alone, which are those of `Model`."""

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.inference.answering import ANSWERS
from jaxmm.inference.class_prompts import TEMPLATES, class_means, class_prompts
from jaxmm.serving import model_functions as functions_module
from jaxmm.serving.model_functions import LabelEmbeddings, model_functions, warm_up
from tests.pretrained import tiny
from tests.serving.common import DECODING

TEXTS = ["a small red circle", "two green stars", "a heart", "a large blue square above two stars", "stars"]


def functions(model, prompt="a"):
    return model_functions(model, prompt=prompt, decoding=DECODING, templates=TEMPLATES)


def approx(rows):
    return [[(text, pytest.approx(score, abs=1e-4)) for text, score in row] for row in rows]


@pytest.fixture(scope="module")
def captioner():
    return tiny.captioner()


def test_what_models_offer(captioner):
    assert set(functions(captioner)) == {"caption", "attention"}
    assert set(functions(tiny.answerer())) == {"answer"}
    assert set(functions(tiny.matcher())) == {"match", "image", "text", "labels"}
    assert set(functions(tiny.clip())) == {"image", "text", "labels"}
    assert set(functions(tiny.vit())) == {"classes"}


def test_captions_and_answers(captioner):
    pictures = tiny.pictures(3)
    prepared = [captioner.prepare(picture) for picture in pictures]
    together = functions(captioner)["caption"].compute(prepared)
    assert together == approx(captioner.caption(picture, decoding=DECODING, top=3)[0] for picture in pictures)
    answerer = tiny.answerer()
    prepared = [answerer.prepare(picture) for picture in pictures]
    together = functions(answerer)["answer"].compute(list(zip(prepared, TEXTS[2:], strict=True)))
    assert together == approx(answerer.answer(picture, text, top=ANSWERS.beams)[0]
                              for picture, text in zip(pictures, TEXTS[2:], strict=True))


def test_matches_of_different_numbers_of_texts():
    matcher, pictures = tiny.matcher(), tiny.pictures(4)
    own = [TEXTS[:1], TEXTS, TEXTS[3:], TEXTS[1:4]]
    together = functions(matcher)["match"].compute(
        [(matcher.prepare(picture), texts) for picture, texts in zip(pictures, own, strict=True)])
    for row, picture, texts in zip(together, pictures, own, strict=True):
        np.testing.assert_allclose(row, matcher.match(picture, texts)[0], atol=1e-5)


def test_classes_are_all_of_them():
    vit, pictures = tiny.vit(), tiny.pictures(3)
    together = functions(vit)["classes"].compute([vit.prepare(picture) for picture in pictures])
    assert together == approx(vit.classify(pictures, top=5))


def test_labels_are_encoded_once(monkeypatch):
    clip, calls = tiny.clip(), []
    encode = type(clip).encode_text
    monkeypatch.setattr(type(clip), "encode_text", lambda self, texts: calls.append(texts) or encode(self, texts))
    monkeypatch.setattr(functions_module, "LABELS", 3)
    labels, expected = LabelEmbeddings(clip, ("a {}", "the {}")), {}
    for name in ("a circle", "star", "a heart", "square"):
        expected[name] = class_means(encode(clip, class_prompts([name], ("a {}", "the {}"))), 1)[0]
    for requests, new in ([[["star", "a circle"], ["star"]], ["star", "a circle"]], [[["a circle"]], []],
                          [[["a heart", "square"]], ["a heart", "square"]], [[["star"]], ["star"]]):
        calls.clear()
        rows = labels(requests)
        assert list(chain(*calls)) == class_prompts(new, ("a {}", "the {}"))      # four are one too many
        for row, names in zip(rows, requests, strict=True):
            np.testing.assert_allclose(row, [expected[name] for name in names], atol=1e-5)


def test_attention_is_of_the_words_behind_the_prompt(captioner):
    """The decoder's own maps, token by token: these words have one token each."""
    prompt, text, pictures = "a small", "red circle", tiny.pictures(3)
    tokens = [captioner.task.decoder.start_id, *captioner.tokenizer([f"{prompt} {text}"])[0, 1:6]]
    prepared = [captioner.prepare(picture) for picture in pictures]
    together = functions(captioner, prompt)["attention"].compute([(image, text) for image in prepared])
    maps = np.asarray(captioner.task.decoder.attention(
        captioner.params, {"image": jnp.asarray(prepared)}, jnp.asarray([tokens] * 3)))
    for words, expected in zip(together, maps, strict=True):
        assert [word for word, _ in words] == ["red", "circle"]
        np.testing.assert_allclose([weights for _, weights in words], expected[3:5], atol=1e-5)
    assert np.ptp(maps[:, 3:5]) > 1e-3


def test_after_the_warm_up_nothing_is_compiled(captioner):
    """Any number of requests, up to the largest batch, and any number of labels."""
    clip = functions(tiny.clip())
    offered = [*functions(captioner).values(), *functions(tiny.vit()).values(), clip["text"], clip["labels"]]
    warm_up(offered, 3)
    jax.config.update("jax_no_tracing", True)
    try:
        for function in offered:
            for count in range(1, 4):
                assert len(function.compute([function.example] * count)) == count
        assert clip["labels"].compute([["star", "heart", "square"], ["circle"]])[0].shape == (3, 20)
    finally:
        jax.config.update("jax_no_tracing", False)
