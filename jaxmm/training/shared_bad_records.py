"""Count bad records of all hosts as one process would."""

import numpy as np
from jax.experimental import multihost_utils

from jaxmm import hosts
from jaxmm.data.bad_records import Batch, FaultCounter


class SharedFaults:
    """A `FaultCounter` for batches that hosts read in shares; with one host it counts at once."""

    def __init__(self, counter: FaultCounter, count: int):
        """Wrap `counter`, for `count` hosts."""
        self.counter, self.count = counter, count
        self._own: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, batch: Batch) -> None:
        """Add this host's share of a batch. Raises `DataError` as `FaultCounter.update` does."""
        if self.count == 1:
            self.counter.update(batch)
        else:
            self._own.append((batch["fault"], batch["drawn"]))

    def share(self) -> None:
        """Count what all hosts added since the last call. Called on all hosts; raises `DataError` on all."""
        if not self._own:
            return
        with hosts.waiting("training"):
            gathered = multihost_utils.process_allgather(np.asarray(self._own, np.int32))  # [hosts, batches, 2, rows]
        self._own.clear()
        for batch in np.moveaxis(gathered, 0, 2).reshape(gathered.shape[1], 2, -1):
            self.counter.update(dict(zip(("fault", "drawn"), batch, strict=True)))
