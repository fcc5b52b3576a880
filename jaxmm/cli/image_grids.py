"""`jaxmm generate` and `jaxmm complete`: write a grid of images."""

from pathlib import Path

import numpy as np
from PIL import Image

from jaxmm.cli.image_files import LOADING, Checkpoint, Images, LoadingOptions, Out, expand, load_model
from jaxmm.inference.image_generation import without_rest

LEAST, GAP = 96, 4
"""Least side of an image in a grid, and the gap between images, in pixels."""


def generate(
    model: Checkpoint, out: Out, count: int = 16, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, loading: LoadingOptions = LOADING,
) -> None:
    """Generate images.

    Args:
        model: A model that generates images: a repository of the hub, a folder, a file, or a run's workdir.
        out: Image file to write, a grid.
        count: Number of images.
        temperature: Divisor of the logits before a token is sampled.
        top_k: Sample from the k most probable tokens; 0: from all.
        top_p: Sample from the smallest set of tokens with this total probability.
        seed: Seed of the sampling.
        loading: How the model is read.
    """
    images = load_model(model, loading).generate_images(count, temperature=temperature, top_k=top_k, top_p=top_p,
                                                        seed=seed)
    columns = round(count**0.5)
    blank = np.full_like(images[:-count % columns], 255)
    write_grid(out, np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:]))


def complete(
    model: Checkpoint, images: Images, out: Path = Path("completed.png"), keep: str = "top", samples: int = 4,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
    loading: LoadingOptions = LOADING,
) -> None:
    """Complete images of which a part is kept.

    A row of the grid is an image, the part of it that the model is given, and what the model makes of that.

    Args:
        model: A model that generates images: a repository of the hub, a folder, a file, or a run's workdir.
        images: Files, or folders of them.
        out: Image file to write, a grid.
        keep: Part that stays: top, left, or the share of the image that comes first, such as 0.5.
        samples: Number of completions of each image.
        temperature: Divisor of the logits before a token is sampled.
        top_k: Sample from the k most probable tokens; 0: from all.
        top_p: Sample from the smallest set of tokens with this total probability.
        seed: Seed of the sampling.
        loading: How the model is read.
    """
    loaded, paths = load_model(model, loading), expand(images)
    completed = loaded.complete(paths, keep=keep, samples=samples, temperature=temperature, top_k=top_k, top_p=top_p,
                                seed=seed)
    originals = loaded.preprocess(paths)[:, None]
    given = without_rest(loaded.task.decoder, originals, keep)
    write_grid(out, np.concatenate([originals, given, completed], axis=1))


def write_grid(out: Path, images: np.ndarray) -> None:
    """Write images uint8 [rows, columns, h, w, 3] as one file; small ones are enlarged."""
    factor = max(1, -(-LEAST // images.shape[2]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, _ = images.shape
    Image.fromarray(images.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-GAP, :-GAP]).save(out)
    print(f"{rows} x {columns} images in {out}")
