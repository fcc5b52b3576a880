"""`jaxmm answer`."""

from typing import Annotated

from jaxmm.cli.image_files import ANSWERER, LOADING, Image, LoadingOptions, load_model, read_labels
from jaxmm.cli.parsing import positional
from jaxmm.inference.answering import ANSWERS
from jaxmm.inference.generate import Decoding
from jaxmm.terminal import print_json, print_table


def answer(
    image: Image, question: Annotated[str, *positional("QUESTION")], model: str = ANSWERER, choices: str | None = None,
    top: int = 1, decoding: Decoding = ANSWERS, json: bool = False, loading: LoadingOptions = LOADING,
) -> None:
    """Answer a question about an image.

    Args:
        image: A file.
        question: The question.
        model: A model that answers: a repository of the hub, a folder, a file, or a run's workdir.
        choices: Answers to choose from, separated by commas; or a text file with one per line. Default: any answer.
        top: Number of answers; without choices at most the number of beams.
        decoding: Search or sampling of the tokens, without choices.
        json: Print one line of JSON per answer instead of a table.
        loading: How the model is read.
    """
    names = None if choices is None else read_labels(choices)
    [answers] = load_model(model, loading).answer([str(image)], question, choices=names, decoding=decoding, top=top)
    if json:
        for text, score in answers:
            print_json({"answer": text, "score": score})
    else:
        print_table(("answer", "score"), ((text, f"{score:.3f}") for text, score in answers))
