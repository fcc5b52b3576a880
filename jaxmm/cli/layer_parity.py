"""`jaxmm parity`."""

import numpy as np

from jaxmm.cli.image_files import Checkpoint
from jaxmm.compiling import use_compilation_cache
from jaxmm.inference.parity import compare
from jaxmm.terminal import print_json, print_table


def parity(source: Checkpoint, revision: str | None = None, json: bool = False) -> None:
    """Compare every layer with the published implementation.

    Runs golden inputs through both and prints the largest difference of each layer. If the other library is not
    installed (extra `parity`), prints the mean and the largest absolute value that jaxmm computes.

    Args:
        source: A repository of the hub, a folder, or a file.
        revision: Revision of the hub's repository.
        json: Print one line of JSON per layer instead of a table.
    """
    use_compilation_cache()
    differences, computed, library = compare(source, revision=revision)
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
