"""`jaxmm caption`."""

from pathlib import Path

from jaxmm.cli.caption_files import CaptionFormat, caption_files, write_captions
from jaxmm.cli.image_files import (
    CAPTIONER,
    LOADING,
    Images,
    LoadingOptions,
    expand,
    load_model,
    read_labels,
    run_on_images,
)
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.generate import Decoding
from jaxmm.paths import user_path
from jaxmm.terminal import print_json, print_table
from jaxmm.validation import ConfigError


def caption(
    images: Images, model: str = CAPTIONER, prompt: str | None = None, top: int = 1,
    decoding: Decoding = CAPTIONS, seed: int = 0, choices: str | None = None, json: bool = False,
    to: CaptionFormat | None = None, out: Path | None = None, overwrite: bool = False,
    loading: LoadingOptions = LOADING,
) -> None:
    """Caption images.

    Args:
        images: Files, or folders of them.
        model: A model that captions: a repository of the hub, a folder, a file, or a run's workdir.
        prompt: Beginning of every caption, not part of the output. Default: that of the model's training.
        top: Number of captions per image, at most the number of beams; with sampling any number.
        decoding: Search or sampling of the tokens.
        seed: Seed of the sampling.
        choices: Captions to choose from instead, separated by commas; or a text file with one per line.
        json: Print one line of JSON per image instead of a table.
        to: Write files instead of printing. txt: IMAGE.txt beside each image, one caption per line; csv and jsonl: one
            file, which `captions:FILE` reads; coco: COCO's result format, with the numbers in the images' names as ids.
        out: The file; with txt the folder. Default: captions.csv, captions.jsonl or captions.json.
        overwrite: Replace files that exist.
        loading: How the model is read.
    """
    if to is None and (out is not None or overwrite):
        raise ConfigError("out and overwrite are for files; expected to = txt, csv, jsonl or coco, too")
    paths = expand(images)
    files = None if to is None else caption_files(paths, to, out and user_path(out, "out"), overwrite)
    rows, skipped = run_on_images(map(Path, paths), lambda paths, on_error: load_model(model, loading).caption(
        paths, prompt=prompt, decoding=decoding, top=top, seed=seed, on_error=on_error,
        choices=None if choices is None else read_labels(choices)))
    if to is not None:
        written = write_captions(rows, to, files)
        print(f"captions of {len(rows)} images in {written[0] if len(written) == 1 else f'{len(written)} files'}")
    elif json:
        for path, captions in rows:
            print_json({"picture": path, "captions": [{"caption": text, "score": score} for text, score in captions]})
    else:
        print_table(("image", "caption", "score"), (
            (path if i == 0 else "", text, f"{score:.3f}") for path, captions in rows
            for i, (text, score) in enumerate(captions)))
    skipped.report(len(rows))
