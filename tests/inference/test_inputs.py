"""What a user may pass for images, texts, labels and templates, and what is refused in words."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmm.data.images import decode
from jaxmm.inference.class_prompts import TEMPLATES, class_prompts
from jaxmm.inference.generate import Decoding
from jaxmm.inference.inputs import as_images, as_labels, as_templates, as_texts, image_content
from jaxmm.validation import ConfigError
from tests.pretrained import tiny


class Foreign:
    """An array of another library."""

    def __array__(self, dtype=None, copy=None):
        return np.full((5, 6, 3), 7, np.uint8)


def test_one_image_of_every_kind(tmp_path):
    array = np.full((5, 6, 3), 7, np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(array), array, jnp.asarray(array),
                  Foreign(), Image.open(tmp_path / "a.png")):
        for one in (image, [image], (image,), iter([image]), array[None]):
            single, = as_images(one)
            assert (np.asarray(decode(image_content(single))) == array).all()
    assert len(list(as_images(np.zeros((4, 5, 6, 3), np.uint8)))) == 4
    assert list(as_images(np.array(["a.png", "b.png"]))) == ["a.png", "b.png"]
    for wrong in (b"bytes", {"image": array}, 3, None, 0.5):
        with pytest.raises(TypeError, match=r"images is of type \w+; expected a file, a PIL image, an array"):
            as_images(wrong)
    for wrong in (None, 3, {"a": 1}, object()):
        with pytest.raises(TypeError, match=r"images holds an object of type \w+; expected a file"):
            image_content(wrong)


def test_home_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"1234")
    assert image_content("~/a.png") == b"1234" == image_content(Path("~/a.png"))
    with pytest.raises(OSError, match="a folder; expected a file"):
        image_content(tmp_path)
    with pytest.raises(ConfigError, match="expected a local path, or one in a bucket"):
        image_content("https://host/cat.jpg")


def test_texts():
    assert as_texts("a cat") == ["a cat"] and as_texts(("a", "b")) == ["a", "b"] and as_texts([]) == []
    assert as_texts(np.array(["a", "b"])) == ["a", "b"] and as_texts(text for text in "ab") == ["a", "b"]
    for wrong, words in ((["a", 3], "texts holds 3; expected strings"), ([None], "texts holds None"),
                         ([["a"]], "texts holds"), (b"a", "is of type bytes"), ({"a": 1}, "texts is of type dict"),
                         (3, "texts is of type int; expected a string or several"), (None, "NoneType")):
        with pytest.raises(TypeError, match=words):
            as_texts(wrong)
    with pytest.raises(ValueError, match="names holds ' '; expected words"):
        as_texts(["a", " "], "names", blank=False)


def test_labels_and_templates():
    assert as_labels(["a", "b", "a"]) == ["a", "b"] == as_labels(np.array(["a", "b"])) == as_labels(("a", "b"))
    for wrong in (None, "a cat, a dog", [], ()):
        with pytest.raises(ValueError, match=r"labels is .*; expected a list of class names"):
            as_labels(wrong)
    with pytest.raises(ValueError, match="labels holds ''; expected words"):
        as_labels(["", "a"])
    assert as_templates("a {}") == ["a {}"] and as_templates(TEMPLATES) == list(TEMPLATES)
    for wrong, words in (("a photo", "'a photo'; expected one {} in it"), (["a {}", "{} {}"], "'{} {}'; expected one"),
                         ([], "templates is empty")):
        with pytest.raises(ValueError, match=words):
            as_templates(wrong)


@pytest.mark.parametrize("template, name, prompt", [
    ("a photo of a {}.", "cat", "a photo of a cat."), ("a photo of a {}.", "a cat", "a photo of a cat."),
    ("a photo of a {}.", "an elk", "a photo of an elk."), ("a photo of an {}", "the moon", "a photo of the moon"),
    ("a bad photo of the {}.", "a cat", "a bad photo of the cat."), ("art of the {}.", "the sea", "art of the sea."),
    ("a photo of the large {}.", "an elk", "a photo of the large elk."), ("a origami {}.", "a cat", "a origami cat."),
    ("A {} in a video game.", "The Beatles", "The Beatles in a video game."), ("{}", "a cat", "a cat"),
    ("a photo of {}", "a cat", "a photo of a cat"), ("itap of {}.", "an elk", "itap of an elk."),
    ("a sketch showing {}", "the sea", "a sketch showing the sea"), ("the {}.", "theatre", "the theatre."),
    ("a {}", "a", "a a"), ("a {}", "answer", "a answer"), ("the {}", "A 380", "the 380")])
def test_an_article_is_not_repeated(template, name, prompt):
    assert class_prompts([name, "x"], [template, "y {}"]) == [
        prompt, f"y {name}", template.replace("{}", "x"), "y x"]


def test_names_without_an_article_are_as_published():
    names = ["tench", "great white shark", "black and gold garden spider"]
    assert class_prompts(names, TEMPLATES) == [t.replace("{}", name) for name in names for t in TEMPLATES]


def test_classify_refuses_in_words():
    clip, picture = tiny.clip(), np.zeros((9, 9, 3), np.uint8)
    for options, words in (({"top": 0}, "top is 0; expected a positive number"), ({"top": -1}, "top is -1"),
                           ({"templates": "a photo"}, "'a photo'; expected one"), ({"labels": "a,b"}, "is 'a,b'")):
        with pytest.raises(ValueError, match=words):
            clip.classify(picture, **({"labels": ["a", "b"]} | options))
    with pytest.raises(ValueError, match=r"is a Captioning, which .*writes captions; expected one that classif"):
        tiny.captioner().classify(picture, ["a", "b"])
    with pytest.raises(TypeError, match="pairs holds what is not a pair"):
        model = tiny.Model(task=tiny.PAIR, params=None, preprocessing=tiny.IMAGE, tokenizer=tiny.TOKENIZER)
        model.compare_pair(["a.png", "b.png"], ["x", "y"])


def test_limits_are_checked_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr("jaxmm.inference.captioning.compile_prediction", None)
    model, picture = tiny.captioner(), np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"decoding\.max_length is 25; expected at most 24, the positions"):
        model.caption(picture, decoding=Decoding(max_length=25))
    with pytest.raises(ConfigError, match=r"expected at most 22 tokens, not 40: the model has 24 positions"):
        model.caption(picture, prompt="red circle " * 20)
    with pytest.raises(ConfigError, match=r"decoding\.max_length is 30"):
        tiny.answerer().answer(picture, "red?", decoding=Decoding(max_length=30))
    for options in ({"prompt": ["a"]}, {"choices": [1]}, {"choices": {"a": 1}}):
        with pytest.raises(TypeError, match=r"prompt is of type list|choices"):
            model.caption(picture, **options)
    with pytest.raises(ValueError, match="choices holds ''"):
        model.caption(picture, choices=["", "stars"])


def test_several_samples():
    model, pictures = tiny.captioner(), tiny.pictures(3)
    decoding = Decoding(sample=True, top_p=0.9, max_length=6)
    three, one = (model.caption(pictures, decoding=decoding, top=top, seed=4) for top in (3, 1))
    for row, first in zip(three, one, strict=True):
        scores = [score for _, score in row]
        assert len(row) == 3 and scores == sorted(scores, reverse=True)
        assert any(text == first[0][0] and score == pytest.approx(first[0][1], abs=1e-4) for text, score in row)
    assert len({text for row in three for text, _ in row}) > 3
    assert model.caption(pictures[:1], decoding=decoding, top=3, seed=4)[0][0][0] == three[0][0][0]
    with pytest.raises(ValueError, match=r"top is 0; expected 1 to decoding\.beams = 1, or decoding\.sample"):
        model.caption(pictures, decoding=decoding, top=0)
