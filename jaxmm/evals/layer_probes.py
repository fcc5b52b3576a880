"""Linear probes and nearest neighbours of every layer's features (iGPT, Chen et al. 2020, figure 2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from jaxmm.charts import curves
from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.evals.context import Drawing, EvalContext
from jaxmm.evals.frozen_features import check_train, layers_and_pixels
from jaxmm.evals.knn import knn
from jaxmm.evals.probe import probe
from jaxmm.validation import require


@dataclass(frozen=True, kw_only=True)
class LayerProbes(Evaluator):
    """Measures `layer_probe@l` and `layer_knn@l`, the accuracies on the features of layer l, counted from 0; and
    `pixels_probe` and `pixels_knn`, those on the image's own pixels. Draws them over the layers.
    """

    layers: tuple[int, ...]
    """Layers that are probed."""
    train: str | None = None
    """Source that is fitted on; None: `data.train`."""
    c: tuple[float, ...] = (0.316,)
    """As in `LinearProbe`."""
    k: int = 5
    """As in `KNN`."""
    batch_size: int = 64
    needs: ClassVar = ("embeds images in every layer",)

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        require(self.layers and min(self.layers) >= 0, "evals.layers", self.layers, "numbers of layers, from 0 on")
        require(self.c and min(self.c) > 0, "evals.c", self.c, "one positive number or more")
        require(self.k > 0, "evals.k", self.k, "a positive number")

    def validate(self, context: EvalContext, source: Source) -> None:
        """Raise `ConfigError` if the two sources do not have the same labels."""
        check_train(self, self.train, context, source)

    def names(self, source: Source) -> tuple[str, ...]:
        """Return the names of the metrics."""
        return (*(f"layer_{kind}@{layer}" for kind in ("probe", "knn") for layer in self.layers), "pixels_probe",
                "pixels_knn")

    def measure(self, context: EvalContext, source: Source) -> Iterator[float]:
        """Yield the accuracies."""
        train, test = layers_and_pixels(self, self.train, context, source)
        depth = train.layers.shape[1]
        require(max(self.layers) < depth, "evals.layers", self.layers, f"at most {depth - 1}: there are {depth} layers")
        methods = {"probe": lambda *data: probe(*data, c=self.c, max_iter=1000),
                   "knn": lambda *data: knn(*data, k=self.k, temperature=0.07)}
        by_layer = {name: [method(train.layers[:, layer], train.labels, test.layers[:, layer], test.labels)
                           for layer in self.layers] for name, method in methods.items()}
        pixels = {name: method(train.pixels, train.labels, test.pixels, test.labels)
                  for name, method in methods.items()}
        ends = self.layers[0], self.layers[-1]
        series = {f"linear probe {name}" if kind == "probe" else f"nearest neighbours {name}": points
                  for kind in methods for name, points in (
                      ("by layer", list(zip(self.layers, by_layer[kind], strict=True))),
                      ("of pixels", [(end, pixels[kind]) for end in ends]))}
        context.examples.append(Drawing(
            title="Accuracy by layer", svg=curves(series, "layer"), names=tuple(series),
            text=f"Held-out accuracy of classifiers fitted on frozen features of {len(train.labels):,} images."))
        for values in by_layer.values():
            yield from values
        yield from pixels.values()
