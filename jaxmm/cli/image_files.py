"""Arguments that are image files, models and labels, shared by the commands that use a trained model."""

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from jaxmm.cli.parsing import positional
from jaxmm.compiling import use_compilation_cache
from jaxmm.data.base import find_images
from jaxmm.inference import model
from jaxmm.paths import is_bucket, user_path
from jaxmm.pretrained.io.files import Weights
from jaxmm.validation import ConfigError

CLIP, CAPTIONER = "openai/clip-vit-base-patch32", "Salesforce/blip-image-captioning-base"
ANSWERER, MATCHER = "Salesforce/blip-vqa-base", "Salesforce/blip-itm-base-coco"

PROGRESS = {"unit": " images", "desc": "encoding", "mininterval": 1.0, "dynamic_ncols": True}


Images = Annotated[tuple[Path, ...], *positional("IMAGE...")]
Image = Annotated[Path, *positional("IMAGE")]
Checkpoint = Annotated[str, *positional("SOURCE")]
Out = Annotated[Path, *positional("OUT")]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of commands that load a model, for files that leave something open."""

    architecture: str | None = None
    """Model of an open_clip checkpoint without a configuration, such as ViT-H-14, or a JSON file."""
    weights: Weights | None = None
    """Raw (params) or averaged (average) weights of a file with both."""


LoadingOptions = Annotated[Loading, tyro.conf.arg(name="")]
LOADING = Loading()


class Skipped:
    """The images that could not be read; each is named as it comes."""

    def __init__(self):
        self.images: list[Any] = []

    def __call__(self, image: Any, error: Exception) -> None:
        """Record and name an image that cannot be read."""
        self.images.append(image)
        tqdm.write(f"skipped {image}: {error}", file=sys.stderr)

    def report(self, good: int) -> None:
        """Print how many images were skipped; raise `ConfigError` if no image was `good`."""
        if count := len(self.images):
            print(f"{count} of {count + good} images could not be read", file=sys.stderr)
        if not good:
            raise ConfigError("no image could be read")


def load_model(source: str, loading: Loading = LOADING, **options: Any) -> model.Model:
    """Load the model of a command; its compiled programs are kept for the next one."""
    use_compilation_cache()
    return model.load(source, **asdict(loading), **options)


def load_two_towers(source: str, loading: Loading = LOADING) -> model.Model:
    """Load the model of a search. Raises `ConfigError` for one that does not encode text."""
    loaded = load_model(source, loading)
    if loaded.task.embedder is None or loaded.task.embedder.text is None:
        raise ConfigError(f"model is {source!r}, a {type(loaded.config).__name__}; expected CLIP or SigLIP")
    return loaded


def expand(images: Iterable[Path]) -> list[str]:
    """Return the files among `images` and all images in the folders among them; say what folders hold besides.

    Raises `ConfigError` if there are no images.
    """
    paths: list[str] = []
    passed: Counter[str] = Counter()
    for path in images:
        local = user_path(path, "image")
        if not local.exists():
            raise ConfigError(f"image is {str(path)!r}, which does not exist")
        paths += find_images(local, passed) if local.is_dir() else [str(local)]
    if not paths:
        raise ConfigError(f"image is {', '.join(map(str, images))!r}, a folder without images")
    if passed.total():
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed.most_common() if count)
        print(f"passed over: {kinds}", file=sys.stderr)
    return paths


def run_on_images(
    images: Iterable[Path], run: Callable[[Iterable[str], Skipped], list]
) -> tuple[list[tuple[str, Any]], Skipped]:
    """Return the path and the result of `run` for every image that can be read, and the images that cannot."""
    paths, skipped = expand(images), Skipped()
    results = run(tqdm(paths, **PROGRESS) if len(paths) > 64 else paths, skipped)
    unreadable = set(skipped.images)
    return list(zip((path for path in paths if path not in unreadable), results, strict=True)), skipped


def read_labels(labels: str) -> list[str]:
    """Return labels separated by commas, as in a line of CSV (quotes keep a comma), or the lines of a file."""
    parts = read_lines(labels) if is_file(labels) else next(csv.reader([labels], skipinitialspace=True), [])
    return [part.strip() for part in parts if part.strip()]


def is_file(argument: str) -> bool:
    """Return whether an argument that may be a file or a text is a file: there is one, or it is a path in a bucket."""
    return is_bucket(argument) or os.path.isfile(os.path.expanduser(argument))


def read_lines(file: str) -> list[str]:
    """Return the lines of a text file that are not blank."""
    return [line.strip() for line in user_path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
