"""What the evaluators share: their context, batches of a source, and examples for the report."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from PIL import Image

from jaxmm import hosts
from jaxmm.config import DataConfig, Evaluator
from jaxmm.data.base import Source
from jaxmm.data.eval_pipeline import counted, eval_rows
from jaxmm.data.images import decode
from jaxmm.evals.opened_sources import OpenedSources
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn
from jaxmm.sharding import host_share, place_batch, replicated
from jaxmm.task import Task, capabilities
from jaxmm.validation import ConfigError, require

Arrays = dict[str, np.ndarray]
FIGURE = "figure/"
"""Prefix of metrics that are logged for a figure: no curve, table or printed line shows them."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Values that an evaluator measured on every example or query; its metrics are means over them."""

    values: Mapping[str, np.ndarray]
    """Values [n] of the metrics of these names."""
    index: np.ndarray | None = None
    """Records of the source [n]; None: the examples are no records."""
    labels: np.ndarray | None = None
    """Labels [n], for results by class."""
    describe: Callable[[int], tuple[str, str]] | None = None
    """The expected and the predicted text of the example of this row; None: there are none."""
    per_class: Mapping[str, float] | None = None
    """A score of each class that occurs; None: it follows from `labels`."""


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """A model, and the data to measure it on."""

    task: Task
    params: Any
    average: Any = None
    """Moving average of `params`; None: the run keeps none."""
    data: DataConfig
    train: Source | None = None
    val: Source | None = None
    tokenizer: Any = None
    """Texts to tokens int32 [n, t]; None: the task reads no texts."""
    mesh: Mesh | None = None
    """The batch is cut over its `data` and `fsdp` axes; None: the default device."""
    labels: tuple[str, ...] | None = None
    """Names of the classes of a trained head; None: they are those of `train`, or not known."""
    history: Callable[[], Mapping[str, Sequence[tuple[int, float]]]] = dict
    """What the run has logged before this evaluation: (step, value) pairs by rising step of each metric."""
    watch: Callable[[Iterable, int], Iterable] = field(default=lambda batches, total: batches)
    """Shows progress: yields `batches`, of which there are `total`."""
    sources: OpenedSources = field(default_factory=OpenedSources, repr=False)
    """The sources of evaluators; all contexts of a run share them."""
    outcomes: list[Outcomes] = field(default_factory=list)
    """Evaluators add the values of every example, in the order of `Evaluator.names`."""
    examples: list = field(default_factory=list)
    """Evaluators add what the report shows: `RetrievalExample`, `PredictionExample`, `CaptionExample`, `ImageGrid`,
    `Drawing`."""

    def check(self, evaluator: Evaluator) -> Source:
        """Return the source that `evaluator` measures on. Raise `ConfigError` if the task, the weights or the source
        are not what it needs."""
        name, offered = type(evaluator).__name__, capabilities(self.task)
        if not all(set(need.split(" or ")) & set(offered) for need in evaluator.needs):
            raise ConfigError(f"{name} needs a task that {', '.join(evaluator.needs)}; {type(self.task).__name__} "
                              f"{', '.join(offered) or 'offers nothing'}")
        if evaluator.reads_text and self.tokenizer is None:
            raise ConfigError(f"{name} reads texts; expected a task with a tokenizer")
        self.weights_of(evaluator)
        source = self.source_of(evaluator)
        require(len(source) > 0, f"{name}.source", source.name, "a source with at least one record")
        return source

    def weights_of(self, evaluator: Evaluator) -> Any:
        """Return the parameters that `evaluator.weights` names. Raise `ConfigError` if the run keeps no average."""
        if evaluator.weights == "params":
            return self.params
        if self.average is None:
            raise ConfigError(f"{type(evaluator).__name__}.weights is 'average'; expected 'params', or a run that "
                              "keeps a moving average (optimizer.average)")
        return self.average

    def source_of(self, evaluator: Evaluator) -> Source:
        """Return `evaluator.source`, opened, or the run's held-out source."""
        source = self.open(evaluator.source, self.val)
        if source is None:
            raise ConfigError(f"{type(evaluator).__name__}.source and data.val are None; expected one of them")
        return source

    def open(self, spec: str | None, default: Source | None) -> Source | None:
        """Return the source that `spec` names; None: `default`."""
        return default if spec is None else self.sources.open(spec, self.data.data_dir)

    def batches(self, evaluator: Evaluator, source: Source, tokenizer: Any = None) -> Iterator[dict[str, Any]]:
        """Yield all records of `source` in batches of the size that `evaluator` asks for."""
        size = self.batch_size(evaluator)
        return iter(self.watch(image_batches(source, self, size, tokenizer), -(-len(source) // size)))

    def batch_size(self, evaluator: Evaluator) -> int:
        """Return the batch size of `evaluator`, rounded up to a multiple of the devices."""
        return padded_batch_size(evaluator.batch_size, self.mesh)

    def outputs(self, evaluator: Evaluator, fn: Callable, batches: Iterable[Mapping]
                ) -> Iterator[tuple[Arrays, Arrays]]:
        """Yield (outputs of the compiled `fn`, batch) with the weights that `evaluator` measures."""
        return outputs(fn, self.weights_of(evaluator), batches, self.mesh)

    def predictions(self, evaluator: Evaluator, names: tuple[str, ...], batches: Iterable[Mapping]
                    ) -> Iterator[tuple[Arrays, Arrays]]:
        """Yield (predictions, batch): what the task computes under `names` (see `predict_fn`)."""
        return self.outputs(evaluator, predict_fn(self.task, names, self.mesh), batches)


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """One result of a query: a text or a uint8 [h, w, 3] image, its similarity, and whether it matches."""

    item: str | np.ndarray
    score: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class RetrievalExample:
    """A query (a text or a uint8 [h, w, 3] image) and its results, best first."""

    query: str | np.ndarray
    results: tuple[Retrieved, ...]


@dataclass(frozen=True, kw_only=True)
class PredictionExample:
    """A uint8 [h, w, 3] image, its true class, and the likeliest (class, probability) pairs, best first."""

    image: np.ndarray
    truth: str
    predictions: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class CaptionExample:
    """A uint8 [h, w, 3] image as the model reads it, with the caption that the model wrote."""

    image: np.ndarray
    caption: str
    right: bool
    """True if the caption is one of the image's own captions."""
    truth: str
    """The first of the image's own captions."""
    words: tuple[tuple[str, np.ndarray], ...]
    """Each word of the caption with its cross-attention map over the patches, [g, g]."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Rows of uint8 [h, w, 3] images under a title."""

    title: str
    text: str
    """Explanation of what the images are."""
    rows: tuple[tuple[np.ndarray, ...], ...]
    columns: tuple[str, ...] = ()
    """Names of the columns; (): they have none."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart of `jaxmm.charts` under a title."""

    title: str
    text: str
    """Explanation of what is drawn."""
    svg: str
    names: tuple[str, ...] = ()
    """Legend: what is drawn in each of the page's colours."""


def check_labels(evaluator: Evaluator, source: Source) -> None:
    """Raise `ConfigError` if the records of `source` have no label."""
    if source.classes is None:
        raise ConfigError(f"{type(evaluator).__name__} needs labels; {source.name!r} has none")


def image_batches(source: Source, context: EvalContext, batch_size: int, tokenizer: Any = None
                  ) -> Iterator[dict[str, Any]]:
    """Yield batches as `eval_batches` does, for a mesh that may span several hosts.

    Each host reads and decodes its own rows only. Images are sharded over the devices of all hosts; every host has the
    other arrays in full.
    """
    share = host_share(context.mesh)
    rows = eval_rows(source, context.data, batch_size, tokenizer, shard=share)
    return counted(source, rows if share[1] == 1 else (_gather(batch, context.mesh) for batch in rows))


def _gather(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Return the global batch of every host's rows: images sharded, the other arrays as numpy."""
    hosts.heartbeat("evaluating", blocking=True)
    placed = place_batch(batch, mesh)
    image = placed.pop("image")
    arrays = {name: np.asarray(value) for name, value in _replicate_fn(mesh)(placed).items()}
    hosts.heartbeat("evaluating")
    return arrays | {"image": image}


@lru_cache(maxsize=4)
def _replicate_fn(mesh: Mesh) -> Callable[[dict], dict]:
    return jax.jit(lambda batch: batch, out_shardings=replicated(mesh))


def concatenate(parts: Iterable[tuple[Arrays, Arrays]]) -> tuple[Arrays, Arrays]:
    """Return all (predictions, batch) of `parts` as one; the batch without its images."""
    results, rest = [], []
    for result, batch in parts:
        results.append(result)
        rest.append({name: value for name, value in batch.items() if name != "image"})
    return tuple({name: np.concatenate([part[name] for part in pieces]) for name in pieces[0]}
                 for pieces in (results, rest))


def embed_texts(evaluator: Evaluator, context: EvalContext, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
    """Return the embeddings of `texts`, in batches of the size that `evaluator` asks for."""
    size = context.batch_size(evaluator)
    tokens = np.asarray(context.tokenizer(texts))
    pad = -len(tokens) % size
    mask = np.arange(len(tokens) + pad) < len(tokens)
    tokens = np.pad(tokens, ((0, pad), (0, 0)), mode="edge")
    batches = ({"tokens": tokens[i:i + size], "mask": mask[i:i + size]} for i in range(0, len(tokens), size))
    return concatenate(context.predictions(evaluator, ("text",), batches))[0]["text"]


def thumbnail(source: Source, index: int, side: int = 112) -> np.ndarray:
    """Return image `index` of `source`, uint8 [h, w, 3], its longer side at most `side` pixels; two side by side."""
    encoded = source[index]["image"]
    images = [decode(one) for one in (encoded if isinstance(encoded, tuple) else (encoded,))]
    for image in images:
        image.thumbnail((side, side))
    if len(images) == 1:
        return np.asarray(images[0])
    both = Image.new("RGB", (sum(one.width for one in images), max(one.height for one in images)), "white")
    for number, image in enumerate(images):
        both.paste(image, (sum(one.width for one in images[:number]), 0))
    return np.asarray(both)


def evenly_spaced(n: int, count: int) -> np.ndarray:
    """Return up to `count` different numbers below `n`, evenly spaced: sources are often sorted by class."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))
