"""Where the heads of each layer attend, relative to the patch that they attend from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmm.charts import COLORS, GRID, INK, drawing
from jaxmm.compiling import compile_prediction
from jaxmm.config import Evaluator
from jaxmm.data.sources.mixed import Mixed
from jaxmm.data.sources.shards import Slice
from jaxmm.evals.context import FIGURE, Drawing, EvalContext, concatenate, evenly_spaced
from jaxmm.optional import require_extra
from jaxmm.task import Task
from jaxmm.validation import POSITIVE

COLUMNS = 3
"""Layers beside each other in the figure."""


@dataclass(frozen=True, kw_only=True)
class AttentionCenters(Evaluator):
    """Measures the attention of every head from the middle patch, in patches: its center, which is the mean offset of
    what it attends to, and its spread, the standard deviation around the center along one axis.

    `center_distance@L` and `center_spread@L` are means over the heads of layer L. The centers are logged too, for the
    figure in the report, which draws their path over the evaluations of the run.
    """

    images: Annotated[int, POSITIVE] = 16
    """Images that the attention is averaged over. Attention by position alone is the same for all of them."""
    batch_size: Annotated[int, POSITIVE] = 16
    """Images per batch, over all devices. The attention weights of all layers are in memory at once."""
    needs: ClassVar = ("attends over patches",)

    def metrics(self, context: EvalContext) -> tuple[str, ...]:
        """Return the names of the metrics."""
        task = context.task
        image = jax.ShapeDtypeStruct((1, task.image_size, task.image_size, 3), jnp.uint8)
        _, layers, heads, *_ = jax.eval_shape(task.patch_attention.weights, context.params, {"image": image}).shape
        means = (f"{self.prefix}/center_{what}@{layer + 1}" for what in ("distance", "spread")
                 for layer in range(layers))
        return *means, *(name for index in np.ndindex(layers, heads) for name in self._path(*index))

    def run(self, context: EvalContext) -> Iterator[tuple[str, float]]:
        """Yield the names and values of the metrics, and add the figure to the report."""
        require_extra("train", "the evaluator AttentionCenters")
        source = self.check(context)
        places = evenly_spaced(len(source), self.images).tolist()
        sample = Mixed(source.name, tuple(Slice(source, place, place + 1) for place in places), (1,) * len(places))
        parts = context.outputs(self, _moments_fn(context.task, context.mesh), context.batches(self, sample))
        means = {name: value.mean(axis=0) for name, value in concatenate(parts)[0].items()}
        centers = means["first"]
        covariances = means["second"] - centers[..., :, None] * centers[..., None, :]
        distances = np.linalg.norm(centers, axis=-1).mean(axis=1)
        spreads = np.sqrt(np.trace(covariances, axis1=-2, axis2=-1) / 2).mean(axis=1)
        values = np.concatenate([distances, spreads, centers.ravel()])
        context.examples.append(self._figure(context, centers, covariances))
        yield from zip(self.metrics(context), map(float, values), strict=True)

    def _path(self, layer: int, head: int) -> tuple[str, str]:
        """Return the names under which the center of a head is logged."""
        name = f"{FIGURE}{self.prefix}/center/layer{layer + 1}/head{head + 1}"
        return f"{name}/row", f"{name}/column"

    def _figure(self, context: EvalContext, centers: np.ndarray, covariances: np.ndarray) -> Drawing:
        """Draw the centers, circles of one standard deviation, and the paths from the first evaluation of the run."""
        layers, heads, _ = centers.shape
        logged = context.history()
        paths = {index: np.array([[*(value for _, value in logged.get(name, ())), now] for name, now in
                                  zip(self._path(*index), centers[index], strict=True)])
                 for index in np.ndindex(layers, heads)}
        reach = max(1.5, *(float(np.abs(path).max()) for path in paths.values())) + 0.5
        apart, rows = 2 * reach + 1, -(-layers // COLUMNS)

        def draw(axes) -> None:
            from matplotlib.patches import Ellipse, Rectangle

            def square(x, y, half, **style):
                return Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, **style)

            for (layer, head), path in paths.items():
                across, down = layer % COLUMNS * apart, -(layer // COLUMNS) * apart
                if head == 0:
                    axes.add_patch(square(across, down, reach, color=GRID))
                    axes.add_patch(square(across, down, 0.5, color=INK, linewidth=0.8))
                    axes.text(across, down + reach + 0.1, f"layer {layer + 1}", ha="center", va="bottom")
                color, x, y = COLORS[head % len(COLORS)], across + path[1], down - path[0]
                sizes, axis = np.linalg.eigh(covariances[layer, head] * [[1, -1], [-1, 1]])     # rows count downwards
                major, minor = 2 * np.sqrt(np.maximum(sizes[::-1], 0))
                angle = np.degrees(np.arctan2(axis[0, 1], axis[1, 1]))
                axes.plot(x, y, color=color, linewidth=0.8)
                axes.plot(x[-1:], y[-1:], color=color, marker="o", markersize=3)
                circle = Ellipse((x[-1], y[-1]), major, minor, angle=angle, fill=False, color=color, linewidth=1.2)
                axes.add_patch(circle)
                circle.set_clip_path(square(across, down, reach, transform=axes.transData))
            axes.set_xlim(-reach, (min(layers, COLUMNS) - 1) * apart + reach)
            axes.set_ylim(-(rows - 1) * apart - reach, reach + 1)
            axes.set_aspect("equal")
            axes.axis("off")

        size = 2.2 * min(layers, COLUMNS), 2.3 * rows
        return Drawing(
            title="Where the heads attend", svg=drawing(draw, "attention centers of each layer", size),
            text="From the middle patch (black square) of held-out images: the mean offset of what each head attends "
                 "to (dot), one standard deviation around it, and the path of the dot during training. Units are "
                 "patches.")


@lru_cache(maxsize=4)
def _moments_fn(task: Task, mesh: Mesh | None) -> Callable[[Any, Mapping], dict]:
    """Return the compiled first and second moments [b l h 2 (2)] of the offsets that the middle patch attends to."""
    rows, columns = task.patch_attention.grid
    middle = rows // 2 * columns + columns // 2
    offsets = np.mgrid[:rows, :columns].reshape(2, -1).T - [rows // 2, columns // 2]

    def moments(params, batch):
        weights = task.patch_attention.weights(params, batch)[..., middle, :]
        return {"first": jnp.einsum("blhn,ni->blhi", weights, offsets.astype(np.float32)),
                "second": jnp.einsum("blhn,ni,nj->blhij", weights, *[offsets.astype(np.float32)] * 2)}

    return compile_prediction(moments, mesh)
