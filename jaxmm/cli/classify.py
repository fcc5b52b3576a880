"""`jaxmm classify`."""

from jaxmm.cli.image_files import (
    CLIP,
    LOADING,
    Images,
    LoadingOptions,
    is_file,
    load_model,
    read_labels,
    read_lines,
    run_on_images,
)
from jaxmm.inference.class_prompts import TEMPLATES
from jaxmm.terminal import print_json, print_table


def classify(
    images: Images, model: str = CLIP, labels: str | None = None, templates: tuple[str, ...] = TEMPLATES, top: int = 5,
    json: bool = False, loading: LoadingOptions = LOADING,
) -> None:
    """Classify images.

    CLIP and SigLIP choose among any `labels`; a model with a classification head has its own.

    Args:
        images: Files, or folders of them.
        model: A repository of the hub, a folder, a file, or a run's workdir.
        labels: Names of classes, separated by commas; or a text file with one per line.
        templates: Sentences with {} in the place of the class name, such as "a photo of a {}."; or one text file with
            one per line. An article that the label already has is not repeated.
        top: Number of classes per image.
        json: Print one line of JSON per image instead of a table.
        loading: How the model is read.
    """
    names = None if labels is None else read_labels(labels)
    if len(templates) == 1 and is_file(templates[0]):
        templates = tuple(read_lines(templates[0]))
    rows, skipped = run_on_images(images, lambda paths, on_error: load_model(model, loading).classify(
        paths, names, templates=templates, top=top, on_error=on_error))
    if json:
        for path, classes in rows:
            print_json({"picture": path, "labels": [{"label": name, "probability": share} for name, share in classes]})
    else:
        print_table(("image", "label", "probability"), (
            (path if i == 0 else "", name, f"{share:.1%}") for path, classes in rows
            for i, (name, share) in enumerate(classes)))
    skipped.report(len(rows))
