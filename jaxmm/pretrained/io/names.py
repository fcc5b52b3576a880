"""Names of tensors as training frameworks write them: prefixes of wrappers, averaged weights beside raw ones."""

from collections.abc import Mapping
from typing import Literal

from jaxmm.pretrained.io.tensors import FileError, Tensor, Tensors

Weights = Literal["params", "average"]
"""Raw weights, or their exponential moving average."""
WRAPPERS = ("module", "_orig_mod", "_forward_module", "model", "net", "clip", "clip_model")
"""First parts of names that wrappers add to all of them: DistributedDataParallel, torch.compile, Lightning, a user's
own module. They may follow each other in any order."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "ema",
            "averaged_model")
"""First parts of the names of averaged weights, and keys under which training scripts keep them."""
COUNTER = "n_averaged"
"""Name of the counter of `torch.optim.swa_utils.AveragedModel`, whose weights are an average."""


def bare_names(tensors: Tensors, weights: Weights | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of one set of weights by their names in the model, and notes on which set that is.

    `weights` chooses between raw and averaged ones; None: the raw ones if there are any. Raises `FileError` if there
    are none of that kind.
    """
    tensors, averaged = _strip(tensors), {}
    for name in [name for name in tensors if "." in name and name.partition(".")[0] in AVERAGES]:
        averaged[name.partition(".")[2]] = tensors.pop(name)
    if COUNTER in tensors and not averaged:
        averaged, tensors = {name: tensor for name, tensor in tensors.items() if name != COUNTER}, {}
    if not averaged:
        if weights == "average":
            raise FileError("weights is 'average'; the file has no averaged weights")
        return tensors, ()
    if not tensors and weights == "params":
        raise FileError("weights is 'params'; the file has averaged weights only")
    average = weights == "average" or not tensors
    other = "params" if average else "average"
    note = f"the {'averaged (EMA)' if average else 'raw'} weights are read" + (
        f"; the file has both, and weights={other!r} reads the others" if tensors else "")
    return _strip(averaged if average else tensors), (note,)


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the prefixes that all of their names share; a counter of averages may stand beside them.
    """
    tensors = dict(tensors)
    while True:
        names = [name for name in tensors if name != COUNTER]
        first = {name.partition(".")[0] for name in names}
        if len(first) != 1 or not first <= set(WRAPPERS) or not all("." in name for name in names):
            return tensors
        tensors = {name.partition(".")[2] if name != COUNTER else name: tensor for name, tensor in tensors.items()}
