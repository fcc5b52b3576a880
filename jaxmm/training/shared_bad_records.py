"""Bad records of all hosts, counted as one process would."""

import numpy as np
from jax.experimental import multihost_utils

from jaxmm import hosts
from jaxmm.data.bad_records import Batch, FaultCounter


class SharedFaults:
    """A `FaultCounter` for batches of which each host reads a share; with one host it counts at once."""

    def __init__(self, counter: FaultCounter, count: int):
        """`count` hosts."""
        self.counter, self.count = counter, count
        self._own: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, batch: Batch) -> None:
        """Adds this host's share of a batch; raises `DataError` as `FaultCounter.update` does."""
        if self.count == 1:
            self.counter.update(batch)
        else:
            self._own.append((batch["fault"], batch["drawn"]))

    def share(self) -> None:
        """Counts what all hosts added, each as many batches; to be called on all. Raises `DataError` on all."""
        if not self._own:
            return
        hosts.heartbeat("training", blocking=True)
        found = multihost_utils.process_allgather(np.asarray(self._own, np.int32))  # [hosts, batches, 2, rows]
        hosts.heartbeat("training")
        self._own.clear()
        for batch in np.moveaxis(found, 0, 2).reshape(found.shape[1], 2, -1):
            self.counter.update(dict(zip(("fault", "drawn"), batch, strict=True)))
