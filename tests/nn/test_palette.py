"""Colours as tokens: the nearest one, as numpy finds it in fp64; k-means where an image has too many."""

import jax
import numpy as np
import pytest

from jaxmm.nn.palette import Palette, fit_palette
from jaxmm.validation import ConfigError

RNG = np.random.default_rng(0)
COLORS = Palette(colors=tuple(map(tuple, RNG.uniform(-1, 1, (9, 3)).tolist())))


def test_tokens_are_the_nearest_colours_row_by_row():
    images = RNG.integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    tokens = jax.jit(COLORS.to_tokens)(images)
    assert tokens.shape == (2, 20)
    for image, row in zip(images, tokens, strict=True):
        for pixel, token in zip(image.reshape(-1, 3), row, strict=True):
            assert token == np.square(pixel / 127.5 - 1 - np.array(COLORS.colors)).sum(axis=1).argmin()


def test_images_are_the_rounded_colours():
    images = np.asarray(COLORS.to_images(np.arange(9).reshape(1, 9), 3))
    assert images.dtype == np.uint8 and images.shape == (1, 3, 3, 3)
    np.testing.assert_array_equal(images.reshape(9, 3), np.rint(127.5 * (np.array(COLORS.colors) + 1)))
    np.testing.assert_array_equal(COLORS.to_tokens(images), [np.arange(9)])
    bright = Palette(colors=((1.2, -1.5, 0.0),))                # a centre of k-means never is, a file may say so
    assert np.asarray(bright.to_images(np.zeros((1, 1), int), 1)).tolist() == [[[[255, 0, 128]]]]


def test_few_colours_are_kept_exactly():
    images = RNG.choice([0, 17, 255], (6, 4, 4, 1)).repeat(3, axis=-1).astype(np.uint8)
    palette = fit_palette(images, 5)
    assert len(palette.colors) == 5
    np.testing.assert_array_equal(palette.to_images(palette.to_tokens(images), 4), images)
    assert np.asarray(palette.to_tokens(images)).max() == 2     # the repeated last colour is never a token


def test_many_colours_become_means():
    """Three clouds of colours, three centres; the same again, and closer than any two of the pixels' own colours."""
    centres = np.array([[30, 60, 200], [200, 40, 90], [120, 220, 60]])
    images = np.clip(centres[RNG.integers(0, 3, (8, 9, 9))] + RNG.normal(0, 4, (8, 9, 9, 3)), 0, 255).astype(np.uint8)
    palette = fit_palette(images, 3)
    assert palette == fit_palette(images, 3)
    written = np.asarray(palette.to_images(np.arange(9)[None] % 3, 3))[0, 0]
    order = np.argsort(written[:, 0])
    np.testing.assert_allclose(written[order], centres[np.argsort(centres[:, 0])], atol=2)


def test_an_empty_palette():
    with pytest.raises(ConfigError, match=r"palette\.colors is \(\); expected one colour or more"):
        Palette(colors=())
