"""`jaxmm caption`."""

from jaxmm.cli.image_files import CAPTIONER, Images, load_model, read_labels, run_on_images
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.generate import Decoding
from jaxmm.terminal import print_json, print_table


def caption(
    images: Images, model: str = CAPTIONER, prompt: str | None = None, top: int = 1,
    decoding: Decoding = CAPTIONS, seed: int = 0, choices: str | None = None, json: bool = False,
) -> None:
    """Caption images.

    Args:
        images: Files, or folders of them.
        model: A model that captions: a repository of the hub, a folder, a file, or a run's workdir.
        prompt: Beginning of every caption, not part of the output. Default: that of the model's training.
        top: Number of captions per image, at most the number of beams.
        decoding: Search or sampling of the tokens.
        seed: Seed of the sampling.
        choices: Captions to choose from instead, separated by commas; or a text file with one per line.
        json: Print one line of JSON per image instead of a table.
    """
    rows, skipped = run_on_images(images, lambda paths, on_error: load_model(model).caption(
        paths, prompt=prompt, decoding=decoding, top=top, seed=seed, on_error=on_error,
        choices=None if choices is None else read_labels(choices)))
    if json:
        for path, captions in rows:
            print_json({"picture": path, "captions": [{"caption": text, "score": score} for text, score in captions]})
    else:
        print_table(("image", "caption", "score"), (
            (path if i == 0 else "", text, f"{score:.3f}") for path, captions in rows
            for i, (text, score) in enumerate(captions)))
    skipped.report(len(rows))
