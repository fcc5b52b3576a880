"""`jaxmm show`."""

from jaxmm.cli.image_files import Checkpoint
from jaxmm.pretrained.io.files import Weights
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.pretrained.summary import describe
from jaxmm.terminal import print_json, print_table


def show(
    source: Checkpoint, revision: str | None = None, json: bool = False, architecture: str | None = None,
    weights: Weights | None = None,
) -> None:
    """Show the parameters, configuration and warnings of a checkpoint.

    The arrays are not read.

    Args:
        source: A repository of the hub, a folder, a file, or a run's workdir.
        revision: Revision of the hub's repository; of a workdir, the number of a step.
        json: Print one JSON object instead of tables.
        architecture: Model of an open_clip checkpoint without a configuration, such as ViT-H-14, or a JSON file.
        weights: Raw (params) or averaged (average) weights of a file with both.
    """
    described = describe(open_checkpoint(
        source, revision=revision, architecture=architecture, weights=weights))
    if json:
        print_json(described)
        return
    print(f"{described['name']}: {described['family']}, {described['parameters']:,} parameters")
    print_table(("part", "parameters"), ((name, f"{count:,}") for name, count in described["parts"].items()))
    print_table(("field", "value"), ((name, str(value)) for name, value in described["config"].items()))
    for note in described["notes"]:
        print(f"note: {note}")
