"""`jaxmm search`: an index of a folder of images, and queries of it."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from jaxmm.cli.image_files import (
    CLIP,
    LOADING,
    PROGRESS,
    Loading,
    LoadingOptions,
    Out,
    Skipped,
    expand,
    is_file,
    load_two_towers,
)
from jaxmm.cli.parsing import positional
from jaxmm.inference.search import build_index, open_index
from jaxmm.terminal import print_json, print_table


def model_address(model: str) -> str:
    """Return how an index names its model: an absolute path, or a repository of the hub."""
    local = os.path.expanduser(model)
    return os.path.abspath(local) if os.path.exists(local) else model


def index(folder: Annotated[Path, *positional("FOLDER")], out: Out, model: str = CLIP,
          loading: LoadingOptions = LOADING) -> None:
    """Encode all images in a folder into an index that `search query` reads.

    If it is interrupted, the same command continues.

    Args:
        folder: Folder of the images; those in its subfolders count too.
        out: The index, a new folder.
        model: CLIP or SigLIP: a repository of the hub, a folder, a file, or a run's workdir.
        loading: How the model is read.
    """
    paths, skipped = expand((folder,)), Skipped()
    loaded = load_two_towers(model, loading)
    with tqdm(total=len(paths), **PROGRESS) as bar:
        kept = build_index(lambda chunk, on_error: loaded.encode_image(chunk, on_error=on_error),
                           model_address(model), paths, out, loading=given_options(loading),
                           on_error=skipped, on_chunk=bar.update)
    print(f"{out}: {kept:,} images")
    skipped.report(kept)


def given_options(loading: Loading) -> dict[str, str]:
    """Return the options of `loading` that were given, as a query from any folder reads them."""
    given = {name: value for name, value in asdict(loading).items() if value is not None}
    return {name: os.path.abspath(local) if os.path.isfile(local := os.path.expanduser(value)) else value
            for name, value in given.items()}


def query(out: Out, words: Annotated[str, *positional("QUERY")], top: int = 10, json: bool = False) -> None:
    """Find the images of an index that are nearest to a text or an image.

    Args:
        out: The index.
        words: A text, or the path of an image.
        top: Number of images.
        json: Print one line of JSON per image instead of a table.
    """
    opened = open_index(out)
    loaded = load_two_towers(opened.model, Loading(**opened.loading))
    embedding = loaded.encode_image([words]) if is_file(words) else loaded.encode_text([words])
    nearest = opened.search(embedding[0], top)
    if json:
        for image in nearest:
            print_json({"picture": image.path, "score": image.score})
    else:
        print_table(("score", "image"), ((f"{image.score:.4f}", image.path) for image in nearest))
