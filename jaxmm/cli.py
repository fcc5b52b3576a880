"""The `jaxmm` command: what a trained model can do, without writing Python."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from jaxmm import hosts
from jaxmm.capfilt import commands
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import ConfigError
from jaxmm.data.bad_records import BadRecord
from jaxmm.data.base import find_pictures
from jaxmm.data.tools.commands import check_data, import_data, show_data
from jaxmm.inference import parity as parities
from jaxmm.inference.answering import ANSWERS
from jaxmm.inference.captioning import CAPTIONS
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import Format, Model, load
from jaxmm.inference.search import Found, SearchError, build_index, open_index
from jaxmm.planning.commands import plan
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.pretrained.summary import describe
from jaxmm.terminal import choice, place, print_json, print_table
from jaxmm.training.runtime import keep_memory

DEFAULT = "openai/clip-vit-base-patch32"
CAPTIONER = "Salesforce/blip-image-captioning-base"
ANSWERER = "Salesforce/blip-vqa-base"
MATCHER = "Salesforce/blip-itm-base-coco"


Pictures = Annotated[tuple[Path, ...], tyro.conf.Positional, place("PICTURE...")]
Picture = Annotated[Path, tyro.conf.Positional, place("PICTURE")]
Texts = Annotated[tuple[str, ...], tyro.conf.Positional, place("TEXT...")]
Source = Annotated[str, tyro.conf.Positional, place("SOURCE")]
Folder = Annotated[Path, tyro.conf.Positional, place("FOLDER")]
Out = Annotated[Path, tyro.conf.Positional, place("OUT")]
Words = Annotated[str, tyro.conf.Positional, place("WORDS")]
Question = Annotated[str, tyro.conf.Positional, place("QUESTION")]


class Skipped:
    """Names pictures that cannot be read as they come, and remembers them."""

    def __init__(self):
        self.pictures: list[Any] = []

    def __call__(self, picture: Any, error: Exception) -> None:
        """One more."""
        self.pictures.append(picture)
        tqdm.write(f"skipped {picture}: {error}", file=sys.stderr)


def classify(
    pictures: Pictures,
    model: str = DEFAULT,
    labels: str | None = None,
    top: int = 5,
    json: bool = False,
) -> None:
    """Says what is in pictures.

    With CLIP or SigLIP among any `labels`; a model with a classification head knows its own.

    Args:
        pictures: Files, or folders of them.
        model: A repository of the hub, a folder, a file, or a run's work folder.
        labels: Names of classes, separated by commas; or a text file with one a line.
        top: So many classes a picture.
        json: A line of JSON a picture instead of a table.
    """
    names = None if labels is None else read_labels(labels)
    rows, skipped = each(pictures, lambda paths, on_error: load(model).classify(
        progress(paths), names, top=top, on_error=on_error))
    if json:
        for path, found in rows:
            print_json({"picture": path, "labels": [{"label": name, "probability": share} for name, share in found]})
    else:
        print_table(("picture", "label", "probability"), (
            (path if i == 0 else "", name, f"{share:.1%}") for path, found in rows
            for i, (name, share) in enumerate(found)))
    end(skipped, len(rows))


def caption(
    pictures: Pictures, model: str = CAPTIONER, prompt: str | None = None, top: int = 1,
    decoding: Decoding = CAPTIONS, seed: int = 0, choices: str | None = None, json: bool = False,
) -> None:
    """Writes captions of pictures.

    Args:
        pictures: Files, or folders of them.
        model: BLIP that writes: a repository of the hub, a folder, a file, or a run's work folder.
        prompt: What captions begin with; it is not part of them. As in training, if not said.
        top: So many captions a picture, at most as many as beams.
        decoding: How they are written.
        seed: Of what is drawn.
        choices: Captions to choose from instead, separated by commas; or a text file with one a line.
        json: A line of JSON a picture instead of a table.
    """
    rows, skipped = each(pictures, lambda paths, on_error: load(model).caption(
        progress(paths), prompt=prompt, decoding=decoding, top=top, seed=seed, on_error=on_error,
        choices=None if choices is None else read_labels(choices)))
    if json:
        for path, found in rows:
            print_json({"picture": path, "captions": [{"caption": text, "score": score} for text, score in found]})
    else:
        print_table(("picture", "caption", "score"), (
            (path if i == 0 else "", text, f"{score:.3f}") for path, found in rows
            for i, (text, score) in enumerate(found)))
    end(skipped, len(rows))


def answer(
    picture: Picture, question: Question, model: str = ANSWERER, choices: str | None = None, top: int = 1,
    decoding: Decoding = ANSWERS, json: bool = False,
) -> None:
    """Answers a question about a picture.

    Args:
        picture: A file.
        question: What is asked.
        model: BLIP that answers: a repository of the hub, a folder, a file, or a run's work folder.
        choices: Answers to choose from, separated by commas; or a text file with one a line. If not said, any.
        top: So many answers; without choices at most as many as beams.
        decoding: How they are written, without choices.
        json: A line of JSON an answer instead of a table.
    """
    names = None if choices is None else read_labels(choices)
    [found] = load(model).answer([str(picture)], question, choices=names, decoding=decoding, top=top)
    if json:
        for text, score in found:
            print_json({"answer": text, "score": score})
    else:
        print_table(("answer", "score"), ((text, f"{score:.3f}") for text, score in found))


def match(picture: Picture, texts: Texts, model: str = MATCHER, json: bool = False) -> None:
    """Says how likely texts and a picture belong together.

    Args:
        picture: A file.
        texts: What may be in it.
        model: BLIP that matches: a repository of the hub, a folder, a file, or a run's work folder.
        json: A line of JSON a text instead of a table.
    """
    shares = load(model).match([str(picture)], texts)[0]
    if json:
        for text, share in zip(texts, shares, strict=True):
            print_json({"text": text, "probability": float(share)})
    else:
        rows = zip(texts, shares, strict=True)
        print_table(("probability", "text"), ((f"{share:.1%}", text) for text, share in rows))


def index(folder: Folder, out: Out, model: str = DEFAULT) -> None:
    """Encodes all pictures in a folder into an index that `jaxmm search query` reads.

    Interrupted, the same command goes on where it was.

    Args:
        folder: Where the pictures are, in it and the folders below.
        out: The index, a new folder.
        model: CLIP or SigLIP: a repository of the hub, a folder, a file, or a run's work folder.
    """
    paths, skipped = expand((folder,)), Skipped()
    loaded = two_towers(model)
    with tqdm(total=len(paths), **BAR) as bar:
        kept = build_index(lambda chunk, on_error: loaded.encode_image(chunk, on_error=on_error),
                           os.path.abspath(model) if os.path.exists(model) else model, paths, out,
                           on_error=skipped, on_chunk=bar.update)
    print(f"{out}: {kept:,} pictures")
    end(skipped, kept)


def query(out: Out, words: Words, top: int = 10, json: bool = False) -> None:
    """Finds the pictures of an index that are nearest to words, or to a picture.

    Args:
        out: The index.
        words: What to look for; or the path of a picture.
        top: So many pictures.
        json: A line of JSON a picture instead of a table.
    """
    found_index = open_index(out)
    loaded = two_towers(found_index.model)
    embedding = loaded.encode_image([words]) if os.path.isfile(words) else loaded.encode_text([words])
    found: list[Found] = found_index.search(embedding[0], top)
    if json:
        for picture in found:
            print_json({"picture": picture.path, "score": picture.score})
    else:
        print_table(("score", "picture"), ((f"{picture.score:.4f}", picture.path) for picture in found))


def convert(
    source: Source, dest: Out, to: Format = "transformers", revision: str | None = None,
    tokenizer: Path | None = None, dtype: str | None = None,
) -> None:
    """Writes a model in another format, with nothing missing and nothing left over.

    Args:
        source: A repository of the hub, a folder, a file, or a run's work folder.
        dest: A new folder.
        to: Whose format.
        revision: Of the hub; of a work folder the number of a step.
        tokenizer: Where the vocabulary is, if not beside the weights.
        dtype: Of the weights: float32, bfloat16; as in the source, if not said.
    """
    model = load(source, revision=revision, tokenizer=tokenizer, dtype=dtype)
    model.save(dest, format=to)
    print(f"{dest}: {model.parameters:,} parameters for {to}")


def show(source: Source, revision: str | None = None, json: bool = False) -> None:
    """Says what is in a checkpoint, without reading its arrays: parameters of each part, configuration, warnings.

    Args:
        source: A repository of the hub, a folder, a file, or a run's work folder.
        revision: Of the hub; of a work folder the number of a step.
        json: One JSON object instead of tables.
    """
    described = describe(open_checkpoint(source, revision=revision))
    if json:
        print_json(described)
        return
    print(f"{described['name']}: {described['family']}, {described['parameters']:,} parameters")
    print_table(("part", "parameters"), ((name, f"{count:,}") for name, count in described["parts"].items()))
    print_table(("field", "value"), ((name, str(value)) for name, value in described["config"].items()))
    for note in described["notes"]:
        print(f"note: {note}")


def parity(source: Source, revision: str | None = None, json: bool = False) -> None:
    """Runs golden inputs through jaxmm and the published implementation: the largest difference of each layer.

    Where that is not installed, prints what jaxmm computes: mean and largest absolute value of each layer.

    Args:
        source: A repository of the hub, a folder, or a file.
        revision: Of the hub.
        json: A line of JSON a layer instead of a table.
    """
    differences, computed, library = parities.compare(source, revision=revision)
    if json:
        for row in differences:
            print_json({"name": row.name, "largest": row.largest, "scale": row.scale, "library": library})
        for name, value in {} if differences else computed.items():
            print_json({"name": name, "mean": float(value.mean()), "largest": float(np.abs(value).max())})
    elif differences:
        print_table(("at", f"largest difference from {library}", "largest value"), (
            (row.name, f"{row.largest:.1e}", f"{row.scale:.3g}") for row in differences))
    else:
        print(f"not compared: {library}")
        print_table(("at", "mean", "largest value"), (
            (name, f"{value.mean():.6f}", f"{np.abs(value).max():.6f}") for name, value in computed.items()))


BAR = {"unit": " pictures", "desc": "encoding", "mininterval": 1.0, "dynamic_ncols": True}


def expand(pictures: Iterable[Path]) -> list[str]:
    """The files among `pictures`, and all in the folders among them. Raises `ConfigError` where there are none."""
    paths: list[str] = []
    for path in pictures:
        if not path.exists():
            raise ConfigError(f"pictures is {str(path)!r}, which does not exist")
        paths += find_pictures(path) if path.is_dir() else [str(path)]
    if not paths:
        raise ConfigError(f"pictures is {', '.join(map(str, pictures))!r}, where there are none")
    return paths


def each(
    pictures: Iterable[Path], run: Callable[[list[str], Skipped], list]
) -> tuple[list[tuple[str, Any]], Skipped]:
    """What `run` finds of each of `pictures` that can be read, with its path; and those that cannot."""
    paths, skipped = expand(pictures), Skipped()
    results = run(paths, skipped)
    unreadable = set(skipped.pictures)
    return list(zip((path for path in paths if path not in unreadable), results, strict=True)), skipped


def read_labels(labels: str) -> list[str]:
    """Labels as they are typed, or of a file with one a line."""
    lines = Path(labels).read_text(encoding="utf-8").splitlines() if os.path.isfile(labels) else labels.split(",")
    return [line.strip() for line in lines if line.strip()]


def two_towers(source: str) -> Model:
    """The model of a search. Raises `ConfigError` for one that knows no words."""
    model = load(source)
    if model.task.embedder is None or model.task.embedder.text is None:
        raise ConfigError(f"model is {source!r}, a {type(model.config).__name__}; wanted CLIP or SigLIP")
    return model


def progress(paths: list[str]) -> Iterable[str]:
    """The paths, with a bar where there are many."""
    return tqdm(paths, **BAR) if len(paths) > 64 else paths


def end(skipped: Skipped, good: int) -> None:
    """Says how many were left out; a failure if all were."""
    if count := len(skipped.pictures):
        print(f"{count} of {count + good} pictures could not be read", file=sys.stderr)
    if not good:
        raise ConfigError("no picture could be read")


def search(command: Annotated[choice(index=index, query=query), tyro.conf.arg(name="")]) -> None:
    """Finds pictures by words or by a picture."""


DATA = {"import": import_data, "check": check_data, "show": show_data}
CAPFILT = {"run": commands.run, "caption": commands.caption, "score": commands.score, "select": commands.select,
           "merge": commands.merge, "report": commands.report, "bootstrap": commands.bootstrap}


def data(command: Annotated[choice(**DATA), tyro.conf.arg(name="")]) -> None:
    """Imports, checks and shows pictures with their captions or labels."""


def capfilt(command: Annotated[choice(**CAPFILT), tyro.conf.arg(name="")]) -> None:
    """Better captions for pictures from the web: BLIP writes some and drops what does not belong."""


def planned(config: Path, topology: str = "v5e:16x16") -> None:
    """Compiles a recipe's train step for chips that need not be there: whether it fits, and how long it may take.

    Args:
        config: The recipe. `jaxmm plan --config RECIPE --help` shows all options.
        topology: Chips and how they are wired.
    """


def main(args: list[str] | None = None) -> int:
    """Parses and runs; turns what can go wrong into one line. The exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    keep_memory()
    args = sys.argv[1:] if args is None else args
    try:
        recipe = any(each.partition("=")[0] == "--config" for each in args)      # whose fields are options, too
        if recipe and args[:1] == ["plan"]:
            return plan(args[1:])
        use_compilation_cache()
        if recipe and args[:2] == ["capfilt", "bootstrap"]:
            commands.run_bootstrap(args[2:])
            return 0
        tyro.extras.subcommand_cli_from_dict(
            {"classify": classify, "caption": caption, "answer": answer, "match": match, "search": search,
             "data": data, "capfilt": capfilt, "convert": convert, "show": show, "parity": parity, "plan": planned},
            prog="jaxmm", args=args, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))
    except (ConfigError, FileError, SearchError, BadRecord, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.exit_status(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return hosts.exit_status(130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
