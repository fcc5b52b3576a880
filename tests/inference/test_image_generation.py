"""Images written token by token: kept pixels stay, the others follow the decoder, whatever the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm import cli
from jaxmm.config import ImageConfig
from jaxmm.inference.generate import Decoding, generate
from jaxmm.inference.image_generation import kept_tokens, without_rest
from jaxmm.inference.model import Model, load
from jaxmm.task import capabilities
from jaxmm.validation import ConfigError
from tests.chain import CHAIN, LEVELS, SIDE, chain_images, chain_params, log_chances
from tests.pretrained import tiny

IMAGE = ImageConfig(size=SIDE, eval_crop="squash")


def model():
    return Model(task=CHAIN, params=chain_params(), preprocessing=IMAGE)


def test_capabilities():
    assert capabilities(CHAIN) == ("embeds images", "embeds images in every layer", "generates images")
    assert "generates images" not in capabilities(tiny.CAPTIONER) and tiny.CAPTIONER.writes_captions


@pytest.mark.parametrize("keep, rows", [
    ("top", ["1111", "1111", "0000", "0000"]), ("left", ["1100"] * 4), (0.375, ["1111", "1100", "0000", "0000"]),
    ("0.5", ["1111", "1111", "0000", "0000"]), (0, ["0000"] * 4)])
def test_kept_tokens(keep, rows):
    kept = kept_tokens(CHAIN.decoder, keep)
    assert ["".join(map(str, row)) for row in kept.reshape(4, 4).astype(int)] == rows
    image = chain_images(2)
    given = without_rest(CHAIN.decoder, image, keep)
    assert (given[:, kept.reshape(4, 4)] == image[:, kept.reshape(4, 4)]).all()
    assert (given[:, ~kept.reshape(4, 4)] == 128).all()


@pytest.mark.parametrize("beams", [1, 25])
def test_kept_tokens_are_forced_wherever_they_are(beams):
    """By numpy: greedily token by token, or the best of all sequences with these tokens."""
    rng, params = np.random.default_rng(5), chain_params()
    tokens = rng.integers(0, LEVELS, (4, 16))
    kept = rng.permuted(np.arange(64).reshape(4, 16) % 16 >= (9 if beams == 1 else 3), axis=1)
    decoding = Decoding(beams=beams, max_length=17, length_penalty=1.0)
    prompt = jnp.asarray(np.pad(tokens, ((0, 0), (1, 0))), jnp.int32)
    run = jax.jit(partial(generate, CHAIN.decoder, decoding=decoding))
    out = run(params, None, prompt, jnp.ones(4, jnp.int32), jax.random.split(jax.random.key(0), 4),
              kept=jnp.asarray(np.pad(kept, ((0, 0), (1, 0)))))
    written = np.asarray(out.tokens[:, 0, 1:])
    np.testing.assert_array_equal(written[kept], tokens[kept])
    for row in range(4):
        free = np.flatnonzero(~kept[row])
        best = tokens[row].copy()
        if beams == 1:
            for place in free:
                best[place] = log_chances(params, best[None])[0, place].argmax()
        else:
            options = np.stack(np.meshgrid(*[np.arange(LEVELS)] * len(free)), -1).reshape(-1, len(free))
            texts = np.tile(best, (len(options), 1))
            texts[:, free] = options
            chances = np.take_along_axis(log_chances(params, texts), texts[..., None], axis=2)[..., 0]
            best = texts[chances[:, free].sum(axis=1).argmax()]
        np.testing.assert_array_equal(written[row], best)
        chance = np.take_along_axis(log_chances(params, best[None]), best[None, :, None], axis=2)[0, free, 0]
        np.testing.assert_allclose(out.score[row, 0], chance.mean(), rtol=1e-5)


def test_samples_are_distributed_as_the_decoder_says_and_do_not_depend_on_the_batch():
    images = model().generate_images(40)
    assert images.shape == (40, SIDE, SIDE, 3) and images.dtype == np.uint8
    assert set(np.unique(images)) <= set(CHAIN.levels)
    np.testing.assert_array_equal(model().generate_images(3), images[:3])
    assert (model().generate_images(3, seed=1) != images[:3]).any()
    first = log_chances(chain_params(), np.zeros((1, 16), int))[0, 0]
    drawn = np.asarray(CHAIN.to_tokens(model().generate_images(400, seed=2)))[:, 0]
    np.testing.assert_allclose(np.bincount(drawn, minlength=LEVELS) / 400, np.exp(first), atol=0.08)
    likely = np.asarray(CHAIN.to_tokens(model().generate_images(4, top_k=1)))
    assert (likely == log_chances(chain_params(), likely).argmax(axis=2)).all()


@pytest.mark.parametrize("keep", ["top", "left", 0.25])
def test_completions_keep_what_they_are_given(keep):
    images = chain_images(3)
    completed = model().complete(images, keep=keep, samples=5)
    assert completed.shape == (3, 5, SIDE, SIDE, 3)
    kept = kept_tokens(CHAIN.decoder, keep).reshape(SIDE, SIDE)
    np.testing.assert_array_equal(completed[:, :, kept], np.repeat(images[:, None], 5, axis=1)[:, :, kept])
    free = completed[:, :, ~kept]
    assert (free != free[:, :1]).any() and (free[0] != free[1]).any()
    likely = model().complete(images, keep=keep, top_k=1)[:, 0]
    tokens = np.asarray(CHAIN.to_tokens(likely))
    place = ~kept.reshape(-1)
    assert (tokens[:, place] == log_chances(chain_params(), tokens).argmax(axis=2)[:, place]).all()


@pytest.mark.parametrize("call, error, words", [
    (lambda: model().complete(chain_images(1), keep="right"), ValueError, "keep is 'right'; expected top, left"),
    (lambda: model().complete(chain_images(1), keep=1.0), ValueError, "keep is 1.0; expected top, left"),
    (lambda: model().complete(chain_images(1), samples=0), ValueError, "samples is 0"),
    (lambda: model().generate_images(0), ValueError, "count is 0"),
    (lambda: model().generate_images(1, temperature=0.0), ConfigError, "decoding.temperature is 0.0"),
    (lambda: tiny.vit().generate_images(1), ValueError, "Classification, which embeds images, classifies images.*; "
                                                        "expected one that generates images")])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_commands(tmp_path, monkeypatch, capsys, user_cache):
    from PIL import Image

    monkeypatch.setattr("jaxmm.training.runtime.keep_memory", lambda: None)
    model().save(tmp_path / "model")
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, chain_images(2), strict=True):
        Image.fromarray(image).save(path)
    assert cli.main(["generate", str(tmp_path / "model"), str(tmp_path / "grid.png"), "--count", "5"]) == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    size = 96 // SIDE
    assert grid.shape == (3 * 100 - 4, 2 * 100 - 4, 3) and "3 x 2 images" in capsys.readouterr().out
    want = load(tmp_path / "model").generate_images(5)
    np.testing.assert_array_equal(grid[100:196:size, 100:196:size], want[3])
    assert (grid[200:, 100:] == 255).all()
    assert cli.main(["complete", str(tmp_path / "model"), *paths, "--out", str(tmp_path / "c.png"), "--keep", "left",
                     "--samples", "3"]) == 0
    grid = np.asarray(Image.open(tmp_path / "c.png"))
    assert grid.shape == (196, 5 * 100 - 4, 3)
    np.testing.assert_array_equal(grid[100:196:size, 400::size], model().complete(paths, keep="left", samples=3)[1, 2])
    np.testing.assert_array_equal(grid[0:96:size, 0:96:size], chain_images(2)[0])
    assert (grid[0:96, 148:196] == 128).all()
    assert cli.main(["complete", str(tmp_path / "model"), *paths, "--keep", "bottom"]) == 1
    assert "error: keep is 'bottom'; expected top, left" in capsys.readouterr().err
