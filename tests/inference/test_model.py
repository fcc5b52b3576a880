"""The model object: what it computes, for batches of any length; what it saves loads as the same."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmm
from jaxmm.data.images import BadImage
from jaxmm.data.transforms import eval_image
from jaxmm.inference.answering import candidate_tokens, rank
from jaxmm.inference.batching import predict_fn
from jaxmm.inference.generate import Decoding, generate
from jaxmm.inference.model import as_images, as_texts, load
from jaxmm.models.blip import BLIP
from jaxmm.pretrained.io.files import FileError
from jaxmm.sharding import make_mesh, named_leaves
from tests.pretrained import tiny
from tests.training.common import assert_same_bits, clip_run


@pytest.fixture(scope="module")
def clip():
    return tiny.clip()


@pytest.fixture(scope="module")
def vit():
    return tiny.vit()


def test_embeddings_are_the_pure_functions(clip):
    pictures, texts = tiny.pictures(5), ["a red circle", "stars", ""]
    seen = jnp.stack([np.asarray(eval_image(Image.fromarray(p), tiny.IMAGE)) for p in pictures])
    assert (clip.preprocess(pictures) == seen).all()
    want = clip.task.embedder.image(clip.params, {"image": seen})
    np.testing.assert_allclose(clip.encode_image(pictures), want, atol=1e-6)
    tokens = jnp.asarray(tiny.TOKENIZER(texts))
    assert (clip.tokenize(texts) == tokens).all()
    np.testing.assert_allclose(clip.encode_text(texts), clip.task.embedder.text(clip.params, {"tokens": tokens}),
                               atol=1e-6)
    out = clip.module.apply({"params": clip.params}, clip.task.pixels(seen[:3]), tokens, train=False)
    np.testing.assert_allclose(clip.similarity(pictures[:3], texts), out.logit_scale * out.image @ out.text.T,
                               atol=1e-4)


def test_batches_of_any_length_meet_few_programs(clip):
    fn = predict_fn(clip.task, ("image",), None)
    fn.clear_cache()
    pictures = tiny.pictures(150)
    whole = clip.encode_image(pictures)
    for count in (1, 2, 3, 5, 63, 64, 65, 127, 129, 150):
        np.testing.assert_allclose(clip.encode_image(iter(pictures[:count])), whole[:count], atol=1e-6)
    assert fn._cache_size() <= 7      # 1, 2, 4, ... 64
    assert clip.encode_image([]).shape == (0, 20) and clip.encode_text([]).shape == (0, 20)


@pytest.mark.parametrize("pool", ["eos", "argmax"])
def test_texts_are_cut_where_nothing_more_is_seen(pool, monkeypatch):
    monkeypatch.setattr("jaxmm.inference.model.ROUNDED", 2)
    text = replace(tiny.TEXT, pool=pool, context_length=tiny.LENGTH)
    clip = tiny.clip()
    clip = replace(clip, task=replace(tiny.CLIP, model=replace(tiny.CLIP.model, text=text)))
    texts = ["a", "a small red circle above", "", "two green stars", "a b c d e f g h i j"] * 20
    tokens = clip.tokenize(texts)
    if pool == "argmax":      # the end token has the largest id there
        tokens = np.where(tokens == tiny.TOKENIZER.eos_id, tiny.TOKENIZER.vocab_size - 1, np.minimum(tokens, 50))
        monkeypatch.setattr(type(clip), "tokenize", lambda self, texts: tokens)
    assert len(set(clip._needed(tokens))) > 2
    want = clip.task.embedder.text(clip.params, {"tokens": jnp.asarray(tokens)})
    np.testing.assert_allclose(clip.encode_text(texts), want, atol=1e-6)


def test_pictures_may_be_files_pil_or_arrays(clip, tmp_path):
    paths = tiny.picture_files(tmp_path, 3)
    arrays = tiny.pictures(3)
    want = clip.encode_image(arrays)
    assert (clip.encode_image(paths) == want).all()
    assert (clip.encode_image([Image.fromarray(p) for p in arrays]) == want).all()


def test_one_image_or_text_is_a_list_of_one(clip, vit, tmp_path):
    path, = tiny.picture_files(tmp_path, 1)
    array, = tiny.pictures(1)
    want = clip.encode_image([array])
    for one in (path, Path(path), Image.fromarray(array), array, array[None]):
        assert (clip.encode_image(one) == want).all()
    grey = np.full((9, 11), 7, np.uint8)
    assert vit.classify(grey) == vit.classify([grey]) and len(vit.classify(grey)) == 1
    assert (clip.encode_text("a red circle") == clip.encode_text(["a red circle"])).all()
    assert (clip.tokenize("a red circle") == clip.tokenize(["a red circle"])).all()
    with pytest.raises(ValueError, match=r"labels is 'a cat,a dog'; expected a list of class names"):
        clip.classify(array, "a cat,a dog")
    for wrong in (b"bytes", {"image": array}, 3, None):
        with pytest.raises(TypeError, match=r"images is of type \w+; expected a file, a PIL image, an array"):
            as_images(wrong)
    with pytest.raises(TypeError, match="texts holds 3; expected strings"):
        as_texts(["a", 3])
    with pytest.raises(BadImage, match=r"array float32\[17, 34, 3\]"):
        clip.encode_image(array.astype(np.float32))


def test_unreadable_pictures_are_handed_over(clip, tmp_path):
    paths = tiny.picture_files(tmp_path, 70)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    mixed = [*paths[:3], str(tmp_path / "bad.png"), *paths[3:], str(tmp_path / "none.png")]
    with pytest.raises((BadImage, OSError)):
        clip.encode_image(mixed)
    bad = []
    got = clip.encode_image(mixed, on_error=lambda picture, error: bad.append((picture, type(error))))
    assert bad == [(mixed[3], BadImage), (mixed[-1], FileNotFoundError)]
    np.testing.assert_allclose(got, clip.encode_image(paths), atol=1e-6)


def test_classify(clip, vit):
    pictures = tiny.pictures(4)
    logits = vit.task.classifier.logits(vit.params, {"image": jnp.asarray(vit.preprocess(pictures))})
    shares = np.asarray(jax.nn.softmax(logits, axis=1))
    for row, found in zip(shares, vit.classify(pictures, top=2), strict=True):
        order = np.argsort(-row)[:2]
        assert [name for name, _ in found] == [tiny.LABELS[i] for i in order]
        np.testing.assert_allclose([share for _, share in found], row[order], atol=1e-5)
    labels = ["circle", "square", "star"]
    text = clip.encode_text([f"a {label}" for label in labels])
    want = jax.nn.softmax(np.exp(float(clip.params["logit_scale"])) * clip.encode_image(pictures) @ text.T, axis=1)
    for row, found in zip(np.asarray(want), clip.classify(pictures, labels, templates=["a {}"]), strict=True):
        assert {name: pytest.approx(share, abs=1e-5) for name, share in zip(labels, row, strict=True)} == dict(found)
    with pytest.raises(ValueError, match="labels is None; expected a list of class names"):
        clip.classify(pictures)
    with pytest.raises(ValueError, match="a head for 5 of its own"):
        vit.classify(pictures, labels)


@pytest.mark.parametrize("format", ["jaxmm", "transformers", "open_clip"])
def test_what_is_saved_is_the_same_model(clip, format, tmp_path):
    clip.save(tmp_path / "saved", format=format)
    again = load(tmp_path / "saved")
    assert_same_bits(again.params, clip.params)
    texts = ["a Small RED circle", "stars <&> 🦄", ""]
    assert (again.tokenize(texts) == clip.tokenize(texts)).all()
    pictures = tiny.pictures(3)
    saved_image = replace(tiny.IMAGE, **{"open_clip": {"eval_resize": 1.0}, "transformers": {
        "eval_crop": "center_floor"}}.get(format, {}))      # what they have a place for
    assert (again.preprocess(pictures) == replace(clip, preprocessing=saved_image).preprocess(pictures)).all()
    np.testing.assert_allclose(again.encode_text(texts), clip.encode_text(texts), atol=1e-6)
    with pytest.raises(FileError, match="exists; expected a new folder"):
        clip.save(tmp_path / "saved", format=format)


@pytest.mark.parametrize("format", ["jaxmm", "transformers", "timm"])
def test_a_saved_classifier_is_the_same(vit, format, tmp_path):
    vit.save(tmp_path / "saved", format=format)
    again = load(tmp_path / "saved")
    assert_same_bits(again.params, vit.params)
    assert (again.labels, again.task.pixels) == (vit.labels, vit.task.pixels)
    assert again.classify(tiny.pictures(2)) == vit.classify(tiny.pictures(2))


def test_the_file_of_the_whole_processor_says_how_pictures_are_prepared(clip, tmp_path):
    """Where transformers 5 writes it; it reads that file first too."""
    saved = tmp_path / "saved"
    clip.save(saved, format="transformers")
    before, path = load(saved).preprocessing, saved / "preprocessor_config.json"
    told = {"image_processor": json.loads(path.read_text()) | {"resample": 2}}
    (saved / "processor_config.json").write_text(json.dumps(told))
    assert load(saved).preprocessing == replace(before, interpolation="bilinear") != before
    path.unlink()
    found = load(saved)
    assert found.preprocessing == replace(before, interpolation="bilinear") and not found.notes


def test_formats_refuse_what_they_cannot_hold(clip, vit, tmp_path):
    for model, format in ((vit, "open_clip"), (clip, "timm")):
        with pytest.raises(FileError, match="expected jaxmm, transformers"):
            model.save(tmp_path / "x", format=format)
    odd = replace(vit, task=replace(vit.task, model=replace(tiny.VIT.model, registers=3)))
    for format in ("transformers", "timm"):
        with pytest.raises(FileError, match="registers = 3"):
            odd.save(tmp_path / "x", format=format)
    assert not list(tmp_path.iterdir())


def test_a_mesh_and_a_dtype(clip, tmp_path):
    clip.save(tmp_path / "saved")
    pictures = tiny.pictures(5)
    mesh = make_mesh(jaxmm.TrainConfig(task=tiny.CLIP).mesh.__class__(data=2, fsdp=2, tensor=2))
    spread = load(tmp_path / "saved", mesh=mesh)
    assert any(len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated
               for _, leaf in named_leaves(spread.params))
    np.testing.assert_allclose(spread.encode_image(pictures), clip.encode_image(pictures), atol=1e-5)
    half = load(tmp_path / "saved", dtype="bfloat16")
    assert {str(leaf.dtype) for _, leaf in named_leaves(half.params)} == {"bfloat16"}
    np.testing.assert_allclose(half.encode_image(pictures), clip.encode_image(pictures), atol=0.05)


def test_a_work_folder_is_a_model(tmp_path):
    config = clip_run(tmp_path / "data", steps=4)
    jaxmm.train(config, tmp_path / "run")
    model = load(tmp_path / "run")
    assert model.tokenizer is not None and model.preprocessing == config.data.image
    assert "the moving average of the parameters is used" in model.notes
    state = load(tmp_path / "run", revision="4")
    assert_same_bits(state.params, model.params)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_same_bits(again.params, model.params)
    assert (again.encode_text(["a red circle"]) == model.encode_text(["a red circle"])).all()
    for step in ("3", "x"):
        with pytest.raises(FileError, match="of step 3; it has 4" if step == "3" else "number of a step"):
            load(tmp_path / "run", revision=step)
    data = next(path for path in (tmp_path / "run/checkpoints/4/state").rglob("*") if path.stat().st_size > 500
                and path.is_file())
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(FileError, match="is damaged"):
        load(tmp_path / "run")


@pytest.mark.parametrize("format", ["jaxmm", "transformers"])
@pytest.mark.parametrize("kind", ["captioner", "matcher", "answerer"])
def test_blip_is_saved_and_loaded(kind, format, tmp_path):
    model = getattr(tiny, kind)()
    model.save(tmp_path / "saved", format=format)
    again = load(tmp_path / "saved")
    assert_same_bits(again.params, model.params)
    assert again.config == model.config
    if kind == "captioner" and format == "jaxmm":
        assert again.caption(tiny.pictures(3)) == model.caption(tiny.pictures(3))
    with pytest.raises(FileError, match="expected jaxmm, transformers"):
        model.save(tmp_path / "x", format="open_clip")


def test_captions_are_what_the_decoder_writes_whatever_the_batch():
    model = tiny.captioner()
    pictures, decoding = tiny.pictures(5), Decoding(beams=2, max_length=9)
    captions = model.caption(pictures, decoding=decoding, top=2)
    seen = model.module.apply({"params": model.params}, model.task.pixels(jnp.asarray(model.preprocess(pictures))),
                              train=False, method=BLIP.encode_image)
    prompt = jnp.asarray([[tiny.MED.decode_id, *tiny.TOKENIZER(["a"])[0, 1:2].tolist()]] * 5, jnp.int32)
    want = generate(tiny.CAPTIONER.decoder, model.params, seen, prompt, jnp.full(5, 2),
                       jax.random.split(jax.random.key(0), 5), decoding)
    assert [[text for text, _ in found] for found in captions] == [
        [tiny.TOKENIZER.decode(row[2:]) for row in rows] for rows in np.asarray(want.tokens)]
    np.testing.assert_allclose([[score for _, score in found] for found in captions], want.score, atol=1e-4)
    assert model.caption(pictures[:1], decoding=decoding, top=2)[0][0][0] == captions[0][0][0]
    drawn = Decoding(sample=True, top_p=0.9, max_length=9)
    assert model.caption(pictures, decoding=drawn, seed=1) == model.caption(pictures, decoding=drawn, seed=1)
    with pytest.raises(ValueError, match=r"top is 3; expected 1 to decoding\.beams = 2"):
        model.caption(pictures, decoding=decoding, top=3)
    with pytest.raises(ValueError, match="leaves no room behind it"):
        model.caption(pictures, prompt="a small red circle", decoding=Decoding(max_length=4))
    with pytest.raises(ValueError, match="expected one that writes"):
        tiny.vit().caption(pictures)


def test_a_model_whose_logits_are_nan_writes_nothing():
    model, decoding = tiny.captioner(), Decoding(beams=2, max_length=9)
    broken = replace(model, params=jax.tree.map(lambda leaf: leaf * jnp.nan, model.params))
    for row in broken.caption(tiny.pictures(5), decoding=decoding, top=2):
        assert [text for text, _ in row] == ["", ""] and all(np.isnan(score) for _, score in row)


def test_answers_are_what_the_decoder_writes_or_finds_likeliest():
    model, decoding = tiny.answerer(), Decoding(beams=2, max_length=6)
    pictures, questions = tiny.pictures(3), ["A (red) circle?", "two stars", "above a large green heart"]
    images, asked = model.preprocess(pictures), model.tokenize(["a red circle?", *questions[1:]])
    choices = ["red", "two blue stars", "a heart"]
    candidates, _ = candidate_tokens(tiny.TOKENIZER, choices, model.task.decoder)
    written = model.answer(pictures, questions, decoding=decoding, top=2)
    chosen = model.answer(pictures, questions, choices=choices, top=3)
    for i in (0, 2):      # each alone, without padding
        tokens = jnp.asarray(asked[i:i + 1, :(asked[i] != 0).sum()])
        seen = model.module.apply({"params": model.params}, model.task.pixels(jnp.asarray(images[i:i + 1])),
                                  train=False, method=BLIP.encode_image)
        states = model.module.apply({"params": model.params}, tokens, seen, train=False,
                                    method=BLIP.encode_text_with_image)
        want = generate(model.task.decoder, model.params, states, jnp.full((1, 1), 2), jnp.ones(1, jnp.int32),
                        jax.random.split(jax.random.key(0), 1), decoding)
        told = [tiny.TOKENIZER.decode(row[1:]) for row in np.asarray(want.tokens[0])]
        assert [text for text, _ in written[i]] == told
        np.testing.assert_allclose([score for _, score in written[i]], want.score[0], atol=1e-4)
        ranked = rank(model.task.decoder, model.params, states, jnp.asarray(candidates), top=3)
        assert [text for text, _ in chosen[i]] == [choices[k] for k in ranked.index[0]]
        np.testing.assert_allclose([score for _, score in chosen[i]], ranked.score[0], atol=1e-4)
    same = model.answer(pictures[1:2], questions[1], choices=choices, top=1)
    assert same[0][0][0] == chosen[1][0][0] and len(same[0]) == 1
    for arguments, options, message in (
            ((pictures, questions[:2]), {}, "there are 2 questions for 3 images"),
            ((pictures, ["a", " . ", "b"]), {}, "question ' . ' has no words"),
            ((pictures, "a"), {"choices": []}, r"choices is \[\]; expected a list of one text or more"),
            ((pictures, "a"), {"choices": ["a"], "top": 0}, "top is 0"),
            ((pictures, "a"), {"top": 4}, r"expected 1 to decoding\.beams = 3")):
        with pytest.raises(ValueError, match=message):
            model.answer(*arguments, **options)
    for other in (tiny.vit(), tiny.captioner()):
        with pytest.raises(ValueError, match="expected one that answers questions"):
            other.answer(pictures, "a")


def test_captions_among_choices():
    model, choices = tiny.captioner(), ["red circle", "[SEP] heart", "two stars"]
    pictures = tiny.pictures(3)
    found = model.caption(pictures, choices=choices, top=3)
    seen = model.module.apply({"params": model.params}, model.task.pixels(jnp.asarray(model.preprocess(pictures))),
                              train=False, method=BLIP.encode_image)
    candidates, given = candidate_tokens(tiny.TOKENIZER, choices, model.task.decoder, "a")
    want = rank(model.task.decoder, model.params, seen, jnp.asarray(candidates), given=given, top=3)
    assert given == 2
    assert [[text for text, _ in row] for row in found] == [[choices[i] for i in row] for row in want.index]
    np.testing.assert_allclose([[score for _, score in row] for row in found], want.score, atol=1e-4)
    with pytest.raises(ValueError, match="expected a list of one text or more"):
        model.caption(pictures, choices=[])


def test_attention_maps_are_those_of_each_word_s_tokens(monkeypatch):
    monkeypatch.setattr("jaxmm.inference.model.BATCH", 2)
    model, pictures = tiny.captioner(), tiny.pictures(3)
    captions = ["red circle", "two green stars above", "heart"]
    decoder, images = model.task.decoder, model.preprocess(pictures)
    words = model.attention_maps(pictures, captions)
    assert [[word for word, _ in row] for row in words] == [caption.split() for caption in captions]
    pieces = [tiny.TOKENIZER([word])[0] for word in ("a", "heart")]
    prompt, own = (ids[1:ids.tolist().index(tiny.TOKENIZER.eos_id)].tolist() for ids in pieces)
    tokens = [decoder.start_id, *prompt, *own, tiny.TOKENIZER.eos_id]                             # without padding
    [maps] = decoder.attention(model.params, {"image": jnp.asarray(images[2:])}, jnp.asarray([tokens]))
    at = 1 + len(prompt)
    np.testing.assert_allclose(words[2][0][1], maps[at:at + len(own)].mean(axis=0), atol=1e-6)
    assert np.abs(words[2][0][1] - maps[at + len(own)]).max() > 1e-3
    with pytest.raises(ValueError, match="there are 2 captions for 3 images"):
        model.attention_maps(pictures, captions[:2])
    for other in (tiny.vit(), tiny.answerer()):
        with pytest.raises(ValueError, match="expected one that writes captions"):
            other.attention_maps(pictures, captions)


def test_matching_is_of_every_picture_with_every_text():
    model = tiny.matcher()
    pictures, texts = tiny.pictures(3), ["a red circle", "two stars"]
    got = model.match(pictures, texts)
    images, tokens = model.preprocess(pictures), model.tokenize(texts)
    for i, j in np.ndindex(3, 2):
        matcher = model.task.matcher
        image_tokens = matcher.encode(model.params, {"image": jnp.asarray(images[i:i + 1])})
        want = jax.nn.softmax(matcher.logits(model.params, image_tokens, jnp.asarray(tokens[None, j:j + 1])))[0, 0, 1]
        np.testing.assert_allclose(got[i, j], want, atol=1e-5)
    cosines = model.encode_image(pictures) @ model.encode_text(texts).T
    np.testing.assert_allclose(model.similarity(pictures, texts), cosines, atol=1e-6)
    with pytest.raises(ValueError, match="expected one that matches"):
        tiny.clip().match(pictures, texts)


def test_what_describes_no_model_is_refused(clip, tmp_path):
    clip.save(tmp_path / "saved")
    path = tmp_path / "saved" / "jaxmm.json"
    described = json.loads(path.read_text())
    for change in ({"task": {"type": "os.path"}}, {"image": described["task"]}, {"labels": {"type": "x"}}):
        path.write_text(json.dumps(described | change))
        with pytest.raises(FileError, match=r"jaxmm\.json"):
            load(tmp_path / "saved")
    with pytest.raises(FileError, match="is no folder, no file"):
        load(tmp_path / "nothing here")
