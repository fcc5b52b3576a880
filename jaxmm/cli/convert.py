"""`jaxmm convert`."""

from pathlib import Path

from jaxmm.cli.image_files import Checkpoint, Out, load_model
from jaxmm.inference.model import Format
from jaxmm.pretrained.io.files import Weights


def convert(
    source: Checkpoint, dest: Out, to: Format = "transformers", revision: str | None = None,
    tokenizer: Path | None = None, dtype: str | None = None, architecture: str | None = None,
    weights: Weights | None = None,
) -> None:
    """Write a model in another format, with nothing missing and nothing left over.

    Args:
        source: A repository of the hub, a folder, a file, or a run's workdir.
        dest: A new folder.
        to: The format.
        revision: Revision of the hub's repository; of a workdir, the number of a step.
        tokenizer: File or folder of the vocabulary, if it is not beside the weights.
        dtype: Type of the weights: float32, bfloat16. Default: that of the source.
        architecture: Model of an open_clip checkpoint without a configuration, such as ViT-H-14, or a JSON file.
        weights: Raw (params) or averaged (average) weights of a file with both.
    """
    model = load_model(source, revision=revision, tokenizer=tokenizer, dtype=dtype,
                       architecture=architecture, weights=weights)
    model.save(dest, format=to)
    print(f"{dest}: {model.num_parameters:,} parameters for {to}")
