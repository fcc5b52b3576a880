"""What the train step knows of an objective."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Key

from jaxmm.validation import ConfigError, require

Params = Any
"""A pytree of fp32 arrays."""
Batch = dict[str, jax.Array]
"""A global batch: arrays with a leading example axis."""
Outputs = Any
"""A pytree of arrays with a leading example axis: what the loss needs to know of each example."""
Metrics = dict[str, Float[Array, ""]]


def check_pairs(image_size: int, vision: Any, tokenizer: Any | None) -> None:
    """Raises `ConfigError` where pictures and texts of the data do not fit a task that reads both.

    `vision` is the configuration of the model's picture tower.
    """
    require(image_size == vision.image_size, "data.image.size", image_size,
            f"the model's task.model.vision.image_size = {vision.image_size}")
    if tokenizer is None:
        raise ConfigError("data.train has no texts; wanted a source with captions, such as captions:FILE.jsonl")


class Task:
    """Base of the objectives: subclasses are frozen dataclasses whose methods are pure functions.

    Most objectives are `objective(params, encode(params, prepare(batch)))`, where `encode` treats every example by
    itself and `objective` sees all of the batch; written so, the step can accumulate microbatches exactly. One that
    is not overrides `loss`.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)
    """What of a record it needs: `image`, and `text` or `label`."""
    pictures: ClassVar[int] = 1
    """How many a record has."""
    decomposes: ClassVar[bool] = False
    """Whether the loss of a batch is the mean of the losses of its parts."""
    bounds: ClassVar[tuple[tuple[str, float, float], ...]] = ()
    """(path pattern, lowest, highest): parameters that the optimizer holds within limits."""

    @property
    def splits(self) -> bool:
        """Whether its loss can be computed in microbatches."""
        return type(self).loss is Task.loss

    def bind(self, *, image_size: int, classes: int | None, tokenizer: Any | None) -> "Task":
        """This task with what only the data knows filled in. Raises `ConfigError` where they do not fit."""
        raise NotImplementedError

    def check_batch(self, size: int) -> None:
        """Raises `ConfigError` where the loss takes no batch of this size."""

    def init(self, rng: Key[Array, ""]) -> Params:
        """Fresh parameters."""
        raise NotImplementedError

    def init_extra(self, params: Params, rng: Key[Array, ""]) -> Any:
        """State besides the parameters, derived from them: momentum copies, queues."""
        return {}

    def prepare(self, batch: Batch, rng: Key[Array, ""]) -> Batch:
        """What mixes examples of the batch before they are encoded (mixup)."""
        return batch

    def encode(self, params: Params, batch: Batch, rng: Key[Array, ""]) -> Outputs:
        """Each example by itself, as in training."""
        raise NotImplementedError

    def objective(self, params: Params, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """The loss over the global batch of outputs, and what to log."""
        raise NotImplementedError

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
        """The loss over the global batch, the new extra state, and what to log."""
        mixing, drawing = jax.random.split(rng)
        batch = self.prepare(batch, mixing)
        loss, metrics = self.objective(params, self.encode(params, batch, drawing), batch)
        return loss, (extra, metrics)

    @property
    def predict(self) -> Mapping[str, Callable[[Params, Batch], jax.Array]]:
        """What evaluators may call, by name; each is a pure function of parameters and batch."""
        raise NotImplementedError
