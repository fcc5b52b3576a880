"""`jaxmm match`."""

from typing import Annotated

from jaxmm.cli.image_files import LOADING, MATCHER, Image, LoadingOptions, load_model
from jaxmm.cli.parsing import positional
from jaxmm.terminal import print_json, print_table


def match(
    image: Image, texts: Annotated[tuple[str, ...], *positional("TEXT...")], model: str = MATCHER, json: bool = False,
    loading: LoadingOptions = LOADING,
) -> None:
    """Estimate how likely texts and an image belong together.

    Args:
        image: A file.
        texts: Descriptions to try.
        model: A model that matches: a repository of the hub, a folder, a file, or a run's workdir.
        json: Print one line of JSON per text instead of a table.
        loading: How the model is read.
    """
    probabilities = load_model(model, loading).match([str(image)], texts)[0]
    rows = list(zip(texts, probabilities, strict=True))
    if json:
        for text, probability in rows:
            print_json({"text": text, "probability": float(probability)})
    else:
        print_table(("probability", "text"), ((f"{probability:.1%}", text) for text, probability in rows))
