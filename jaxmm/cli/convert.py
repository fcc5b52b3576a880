"""`jaxmm convert`."""

from pathlib import Path

from jaxmm.cli.image_files import LOADING, Checkpoint, LoadingOptions, Out, load_model
from jaxmm.inference.model import Format


def convert(
    source: Checkpoint, dest: Out, to: Format = "transformers", revision: str | None = None,
    tokenizer: Path | None = None, dtype: str | None = None, loading: LoadingOptions = LOADING,
) -> None:
    """Write a model in another format, with nothing missing and nothing left over.

    Args:
        source: A repository of the hub, a folder, a file, or a run's workdir.
        dest: A new folder.
        to: The format.
        revision: Revision of the hub's repository; of a workdir, the number of a step.
        tokenizer: File or folder of the vocabulary, if it is not beside the weights.
        dtype: Type of the weights: float32, bfloat16. Default: that of the source.
        loading: How the model is read.
    """
    model = load_model(source, loading, revision=revision, tokenizer=tokenizer, dtype=dtype)
    model.save(dest, format=to)
    print(f"{dest}: {model.num_parameters:,} parameters for {to}")
