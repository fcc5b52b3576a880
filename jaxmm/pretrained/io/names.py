"""Names of tensors as training frameworks write them: prefixes of wrappers, averaged weights beside raw ones."""

from collections.abc import Mapping
from typing import Literal

from jaxmm.pretrained.io.tensors import FileError, Tensor, Tensors

Weights = Literal["params", "average"]
"""Raw weights, or their exponential moving average."""
WRAPPERS = ("module", "model", "net", "network", "clip", "clip_model", "student", "online_model", "_forward_module")
"""First parts of names that wrappers add to all of them: DistributedDataParallel, Lightning, a user's own module. They
may follow each other in any order."""
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and checkpointing add anywhere."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "ema",
            "averaged_model")
"""First parts of the names of averaged weights, and keys under which training scripts keep them."""
AVERAGED = "n_averaged"
"""Name of the counter of `torch.optim.swa_utils.AveragedModel`, whose weights are an average."""
COUNTERS = (AVERAGED, "initted", "step", "num_updates", "decay")
"""Names of numbers that averaging keeps beside the weights."""


def bare_names(tensors: Tensors, weights: Weights | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of one set of weights by their names in the model, and notes on which set that is.

    `weights` chooses between raw and averaged ones; None: the raw ones if there are any. Raises `FileError` if there
    are none of that kind.
    """
    outside = {name: ".".join(part for part in name.split(".") if part not in INSIDE) for name in tensors}
    if len(set(outside.values())) == len(tensors) and all(outside.values()):
        tensors = {outside[name]: tensor for name, tensor in tensors.items()}
    tensors, averaged = _strip(tensors), {}
    for name in [name for name in tensors if "." in name and name.partition(".")[0] in AVERAGES]:
        averaged[name.partition(".")[2]] = tensors.pop(name)
    if averaged or AVERAGED in tensors:
        alone = not averaged
        tensors, averaged = (({name: tensor for name, tensor in part.items() if name not in COUNTERS})
                             for part in (tensors, averaged))
        if alone:
            tensors, averaged = {}, tensors
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
    """Return tensors without the prefixes that all of their names share; counters of averages may stand beside them."""
    tensors = dict(tensors)
    while True:
        names = [name for name in tensors if name not in COUNTERS]
        first = {name.partition(".")[0] for name in names}
        if len(first) != 1 or not first <= set(WRAPPERS) or not all("." in name for name in names):
            return tensors
        tensors = {name if name in COUNTERS else name.partition(".")[2]: tensor for name, tensor in tensors.items()}
