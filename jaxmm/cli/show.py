"""`jaxmm show`."""

from dataclasses import asdict

from jaxmm.cli.image_files import LOADING, Checkpoint, LoadingOptions
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.pretrained.summary import describe
from jaxmm.terminal import print_json, print_table


def show(
    source: Checkpoint, revision: str | None = None, json: bool = False, loading: LoadingOptions = LOADING,
) -> None:
    """Show the parameters, configuration and warnings of a checkpoint.

    The arrays are not read.

    Args:
        source: A repository of the hub, a folder, a file, or a run's workdir.
        revision: Revision of the hub's repository; of a workdir, the number of a step.
        json: Print one JSON object instead of tables.
        loading: How the model is read.
    """
    described = describe(open_checkpoint(source, revision=revision, **asdict(loading)))
    if json:
        print_json(described)
        return
    print(f"{described['name']}: {described['family']}, {described['parameters']:,} parameters")
    print_table(("part", "parameters"), ((name, f"{count:,}") for name, count in described["parts"].items()))
    print_table(("field", "value"), ((name, str(value)) for name, value in described["config"].items()))
    for note in described["notes"]:
        print(f"note: {note}")
