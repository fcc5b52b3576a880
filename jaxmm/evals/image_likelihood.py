"""The likelihood of held-out images under a decoder that writes images."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmm.compiling import compile_prediction
from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import EvalContext
from jaxmm.task import Task


@dataclass(frozen=True, kw_only=True)
class ImageLikelihood(Evaluator):
    """Measures `token_loss`: the mean negative log-likelihood of a token (of a pixel, if tokens are pixels), in nats.
    """

    batch_size: int = 32
    metric_names: ClassVar = ("token_loss",)
    needs: ClassVar = ("generates images",)

    def measure(self, context: EvalContext, source: Source) -> tuple[float]:
        """Return the mean over all tokens of all images."""
        fn = make_likelihood_fn(context.task, context.mesh)
        losses = [result["loss"] for result, _ in context.outputs(self, fn, context.batches(self, source))]
        return (float(np.concatenate(losses).mean(dtype=np.float64)),)


@lru_cache(maxsize=4)
def make_likelihood_fn(task: Task, mesh: Mesh | None):
    """Return a compiled function from (parameters, batch of `image`) to `loss` [b t], of every token."""
    decoder = task.decoder

    def run(params, batch):
        tokens = jnp.pad(decoder.to_tokens(batch["image"]), ((0, 0), (1, 0)), constant_values=decoder.start_id)
        logits = decoder.logits(params, tokens[:, :-1], decoder.prepare(params, None), None)
        return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])}

    return compile_prediction(run, mesh)
