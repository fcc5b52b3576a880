"""What the evaluators share: their context, compiled predictions over a mesh, examples for the report."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxmm import hosts
from jaxmm.config import ConfigError, DataConfig, Evaluator, Task, require
from jaxmm.data.base import Source
from jaxmm.data.images import decode
from jaxmm.data.pipeline import counted, eval_rows
from jaxmm.data.sources.registry import open_source
from jaxmm.inference.batching import outputs, padded_batch_size, predict_fn, predictions
from jaxmm.sharding import host_share, place_batch, replicated


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """What an evaluator measures and with what."""

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
    examples: list = field(default_factory=list)
    """Evaluators add held-out examples for the report: `RetrievalExample`, `PredictionExample`, `CaptionExample`."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """One result of a query: a text or a uint8 [h, w, 3] picture, its similarity, and whether it belongs."""

    item: str | np.ndarray
    score: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class RetrievalExample:
    """A query (a text or a uint8 [h, w, 3] picture) and what was found for it, best first."""

    query: str | np.ndarray
    results: tuple[Retrieved, ...]


@dataclass(frozen=True, kw_only=True)
class PredictionExample:
    """A uint8 [h, w, 3] picture, its true class, and the likeliest (class, probability) pairs, best first."""

    image: np.ndarray
    truth: str
    predictions: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class CaptionExample:
    """A uint8 [h, w, 3] picture as the model saw it, what it wrote, whether that is one of the picture's captions, and
    one of these."""

    image: np.ndarray
    caption: str
    right: bool
    truth: str
    words: tuple[tuple[str, np.ndarray], ...]
    """Each word of the caption, and how much it looked at each patch, [g, g]."""


def chosen_weights(evaluator: Evaluator, context: EvalContext) -> Any:
    """The parameters that `evaluator.weights` names; `ConfigError` where the run keeps no average."""
    if evaluator.weights == "params":
        return context.params
    if context.average is None:
        raise ConfigError(f"{type(evaluator).__name__}.weights is 'average'; wanted 'params', or a run that "
                          "keeps a moving average (optimizer.average)")
    return context.average


def chosen_source(evaluator: Evaluator, context: EvalContext) -> Source:
    """`evaluator.source` opened, or the run's held-out source."""
    if evaluator.source is not None:
        return open_source(evaluator.source, data_dir=context.data.data_dir)
    if context.val is None:
        raise ConfigError(f"{type(evaluator).__name__}.source and data.val are None; wanted one of them")
    return context.val


def check(evaluator: Evaluator, context: EvalContext, *predicts: str, tokenizer: bool = False) -> Source:
    """The source that `evaluator` measures on; raises `ConfigError` where it cannot run in `context`."""
    name = type(evaluator).__name__
    offered = {*predictions(context.task), *(["match"] if context.task.matcher is not None else [])}
    missing = [p for p in predicts if p not in offered]
    if missing:
        raise ConfigError(f"{name} asks the task for {missing[0]!r}; {type(context.task).__name__} predicts "
                          f"{', '.join(sorted(offered))}")
    if tokenizer and context.tokenizer is None:
        raise ConfigError(f"{name} reads texts; wanted a task with a tokenizer")
    chosen_weights(evaluator, context)
    source = chosen_source(evaluator, context)
    require(len(source) > 0, f"{name}.source", source.name, "a source with at least one record")
    return source


def check_labels(evaluator: Evaluator, source: Source) -> None:
    """Raises `ConfigError` where the records of `source` bear no label."""
    if source.classes is None:
        raise ConfigError(f"{type(evaluator).__name__} needs labels; {source.name!r} has none")


def picture_batches(source: Source, context: EvalContext, batch_size: int, tokenizer: Any = None
                    ) -> Iterator[dict[str, Any]]:
    """`eval_batches` for a mesh over several hosts: each reads and decodes its own rows alone, pictures are laid out
    over the devices of all, and every host holds the rest of the batch whole."""
    share = host_share(context.mesh)
    rows = eval_rows(source, context.data, batch_size, tokenizer, shard=share)
    return counted(source, rows if share[1] == 1 else (_told_to_all(batch, context.mesh) for batch in rows))


def _told_to_all(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    hosts.heartbeat("evaluating", blocking=True)
    placed = place_batch(batch, mesh)
    image = placed.pop("image")
    found = {name: np.asarray(value) for name, value in _whole(mesh)(placed).items()}
    hosts.heartbeat("evaluating")
    return found | {"image": image}


@lru_cache(maxsize=4)
def _whole(mesh: Mesh) -> Callable[[dict], dict]:
    return jax.jit(lambda batch: batch, out_shardings=replicated(mesh))


def embed(fn: Callable, params: Any, batches: Iterable[Mapping], mesh: Mesh | None
          ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All that `outputs` yields, joined: predictions by name, and the batches' arrays without the pictures."""
    return joined(outputs(fn, params, batches, mesh))


def joined(found: Iterable[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]
           ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """As `embed`, of what is `found`."""
    results, rest = [], []
    for result, batch in found:
        results.append(result)
        rest.append({k: v for k, v in batch.items() if k != "image"})
    return tuple({k: np.concatenate([part[k] for part in parts]) for k in parts[0]} for parts in (results, rest))


def check_features(evaluator: Evaluator, train: str | None, context: EvalContext) -> tuple[Source, Source]:
    """The labelled sources that a frozen model is fitted on (`train`, or `data.train`) and measured on."""
    held_out = check(evaluator, context, "features")
    fitted = context.train if train is None else open_source(train, data_dir=context.data.data_dir)
    name = type(evaluator).__name__
    require(fitted is not None, f"{name}.train", train, "a source, or a run with data.train")
    for source in (fitted, held_out):
        check_labels(evaluator, source)
    require(fitted.classes == held_out.classes, f"{name}.train", fitted.name,
            f"a source with the classes of {held_out.name!r}")
    return fitted, held_out


def frozen_features(evaluator: Evaluator, source: Source, context: EvalContext
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] and labels [n] of `source`, its pictures seen as in evaluation."""
    batches = picture_batches(source, context, padded_batch_size(evaluator.batch_size, context.mesh))
    fn = predict_fn(context.task, ("features",), context.mesh)
    result, batch = embed(fn, chosen_weights(evaluator, context), batches, context.mesh)
    return result["features"], batch["label"]


def thumbnail(source: Source, index: int, side: int = 112) -> np.ndarray:
    """Picture `index` of `source`, uint8 [h, w, 3], its longer side at most `side` pixels; of two, side by side."""
    found = source[index]["image"]
    pictures = [decode(one) for one in (found if isinstance(found, tuple) else (found,))]
    for picture in pictures:
        picture.thumbnail((side, side))
    if len(pictures) == 1:
        return np.asarray(pictures[0])
    both = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)), "white")
    for number, picture in enumerate(pictures):
        both.paste(picture, (sum(one.width for one in pictures[:number]), 0))
    return np.asarray(both)


def spread(n: int, count: int) -> np.ndarray:
    """Up to `count` different numbers below `n`, evenly spaced: sources are often sorted by class."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))


def accuracy(scores: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> dict[int, float]:
    """Share of rows of `scores` [n, classes] whose label is among the k highest, for each k.

    A tie counts against the label, and so does a label whose score is not finite.
    """
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    above = (~(scores < right)).sum(axis=1) - 1
    above = np.where(np.isfinite(right[:, 0]), above, scores.shape[1])
    return {k: float(np.mean(above < k)) for k in ks}
