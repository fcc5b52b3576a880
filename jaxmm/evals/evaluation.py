"""Evaluate a model without training it: choose evaluators by what model and source offer, run them, sum them up."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmm.checkpoints import CheckpointError, read_weights
from jaxmm.config import DataConfig, Evaluator, TrainConfig
from jaxmm.data.base import Source, record_key
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.accuracy import TopKAccuracy
from jaxmm.evals.caption_choice import CaptionChoice
from jaxmm.evals.captions import Captions
from jaxmm.evals.context import FIGURE, EvalContext, Outcomes, evenly_spaced
from jaxmm.evals.image_likelihood import ImageLikelihood
from jaxmm.evals.knn import KNN
from jaxmm.evals.probe import LinearProbe
from jaxmm.evals.reranking import Reranking
from jaxmm.evals.retrieval import Retrieval
from jaxmm.evals.vqa_accuracy import VQAAccuracy
from jaxmm.evals.zero_shot import ZeroShot
from jaxmm.inference.model import Model, load
from jaxmm.paths import user_path
from jaxmm.pretrained.families.native import is_run
from jaxmm.saved_config import from_dict
from jaxmm.validation import ConfigError, require

EVALUATORS: dict[str, type[Evaluator]] = {
    "zero_shot": ZeroShot, "accuracy": TopKAccuracy, "retrieval": Retrieval, "reranking": Reranking,
    "captions": Captions, "vqa": VQAAccuracy, "caption_choice": CaptionChoice, "linear_probe": LinearProbe, "knn": KNN,
    "likelihood": ImageLikelihood}
"""Evaluators by the names that a user chooses them by."""
PREFIX = "test"
"""First part of the metrics' names, which results are without."""
RESAMPLES, SHARE = 1000, 0.95
"""Bootstrap: number of resamples, and the share of them that an interval covers."""
MISTAKES = 24
"""Most mistakes that a result names."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A record for which the prediction is wrong."""

    record: int
    key: str
    expected: str
    predicted: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """Metrics of a model on a source by one evaluator."""

    source: str
    evaluator: str
    """Name in `EVALUATORS`, else that of its type."""
    records: int
    """Number of records of the source."""
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """Ends of the 95 % bootstrap interval of metrics that are means over examples."""
    per_class: dict[str, float] = field(default_factory=dict, repr=False)
    """Accuracy of each class that occurs, or its average precision; equal names are numbered."""
    mistakes: tuple[Mistake, ...] = field(default=(), repr=False)
    """Examples that are wrong, evenly spaced."""
    predictions: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    """Key of the record, what is expected and what was predicted, of every example, if they were asked for."""


def evaluate(
    model: Model | str | Path, on: str | Source | Sequence[str | Source] | None = None, *,
    evaluators: Sequence[str | Evaluator] | None = None, train: str | Source | None = None, shots: int | None = None,
    classes: Sequence[str] | None = None, templates: Sequence[str] | None = None, batch_size: int | None = None,
    data_dir: str | None = None, mesh: Mesh | None = None, predictions: bool = False,
) -> list[Result]:
    """Measure `model` on one source or several, with every evaluator that fits both, or with those of these names.

    Without `on`, the model is the workdir of a run, and its own evaluators run on its held-out source: the metrics are
    those of the run. `train` is the source that linear probe and k-NN fit on, or that VQA's answers come from; with
    `shots` the probe takes that many images per class. `classes` and `templates` replace those of the source in
    zero-shot classification. With `predictions` the results have those of every example. Raises `ConfigError` if an
    evaluator is named that cannot run.
    """
    mesh = model.mesh if isinstance(model, Model) else mesh
    if on is None:
        check_unused(evaluators=evaluators, train=train, shots=shots, classes=classes, templates=templates,
                     batch_size=batch_size)
        context, chosen = run_context(model, mesh, data_dir)
        return [measure(context, evaluator, predictions) for evaluator in chosen]
    model = model if isinstance(model, Model) else load(model, mesh=mesh)
    train = open_source(train, data_dir=data_dir) if isinstance(train, str) else train
    results = []
    for spec in (on,) if isinstance(on, (str, Source)) else on:
        source = open_source(spec, data_dir=data_dir) if isinstance(spec, str) else spec
        context = model_context(model, source, train, data_dir)
        options = {"shots": shots, "classes": classes, "templates": templates, "batch_size": batch_size}
        chosen = choose(context, evaluators, **options)
        results += [measure(context, evaluator, predictions) for evaluator in chosen]
    return results


def check_unused(**options: Any) -> None:
    """Raise `ConfigError` if one of `options` is not None: the evaluators of a run are as its recipe has them."""
    for name, value in options.items():
        require(value is None, name, value, "a source to measure on, too (on); a run's own evaluators stay as they are")


def model_context(model: Model, source: Source, train: Source | None = None, data_dir: str | None = None
                  ) -> EvalContext:
    """Return the context of a loaded model that is measured on `source`."""
    return EvalContext(task=model.task, params=model.params, tokenizer=model.tokenizer, mesh=model.mesh, val=source,
                       train=train, data=DataConfig(image=model.preprocessing, data_dir=data_dir),
                       labels=model.labels)


def run_context(workdir: Any, mesh: Mesh | None, data_dir: str | None = None
                ) -> tuple[EvalContext, tuple[Evaluator, ...]]:
    """Return the context of the last evaluation of the run in `workdir`, and its evaluators. Raises `ConfigError`."""
    path = None if isinstance(workdir, Model) else user_path(workdir, "model")
    if path is None or not is_run(path):
        raise ConfigError("on is None; expected a source, such as folder:DIR or wds:DIR, or the workdir of a run")
    file = path / "config.json"
    config: TrainConfig = from_dict(json.loads(file.read_text("utf-8"))["config"], file)
    data = config.data if data_dir is None else replace(config.data, data_dir=data_dir)
    train, val = (spec and open_source(spec, data_dir=data.data_dir) for spec in (data.train, data.val))
    chosen = tuple(evaluator for evaluator in config.evals if val is not None or evaluator.source is not None)
    if not chosen:
        raise ConfigError(f"on is None, and the run in {path} measures nothing on held-out data; expected a source")
    model = load(path, mesh=mesh)
    params, average = model.params, None
    if config.optimizer.average:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
        try:
            params, average = read_weights(path / "checkpoints", "params", like, None), params
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    return EvalContext(task=model.task, params=params, average=average, data=data, train=train, val=val,
                       tokenizer=model.tokenizer, mesh=mesh), chosen


def choose(context: EvalContext, names: Sequence[str | Evaluator] | None = None, *, shots: int | None = None,
           classes: Sequence[str] | None = None, templates: Sequence[str] | None = None, batch_size: int | None = None
           ) -> tuple[Evaluator, ...]:
    """Return the evaluators of these `names`; None: all that fit the model and the source. Raises `ConfigError`."""
    source, answers = context.val, context.train is not None and context.train.most_answers
    fields = {"zero_shot": {"classes": classes and tuple(classes), "templates": templates and tuple(templates)},
              "linear_probe": {"shots": shots}, "vqa": {"answers": "train" if answers else None}}
    common = {"prefix": PREFIX} | ({} if batch_size is None else {"batch_size": batch_size})

    def make(name: str) -> Evaluator:
        if name not in EVALUATORS:
            raise ConfigError(f"evaluators is {name!r}; expected some of {', '.join(EVALUATORS)}")
        return EVALUATORS[name](**common, **fields.get(name, {}))

    if names is not None:
        chosen = tuple(name if isinstance(name, Evaluator) else make(name) for name in names)
        for evaluator in chosen:
            _check(evaluator, context)
        return chosen
    chosen = tuple(make(name) for name in _suited(context, source) if _fits(make(name), context))
    if not chosen:
        offered = [name for name, there in (("classes", source.classes or source.tags), ("foils", source.has_foils),
                                            ("questions", source.most_answers)) if there]
        raise ConfigError(f"on is {source.name!r}, which has images with {' and '.join(offered) or 'texts'}; expected "
                          f"a source that a {type(context.task).__name__} can be measured on")
    return chosen


def _suited(context: EvalContext, source: Source) -> Iterator[str]:
    """Yield the names of the evaluators that `source` is made for."""
    if source.has_foils:
        yield "caption_choice"
    elif source.most_answers:
        yield "vqa"
    elif source.images_per_record > 1:
        yield "accuracy"
    elif source.tags is not None:
        yield from ("zero_shot", "likelihood")
    elif source.classes is not None:
        yield from ("accuracy", "zero_shot", "likelihood")
        if context.train is not None:
            yield from ("linear_probe", "knn")
    else:
        yield from ("retrieval", "reranking", "captions", "likelihood")


def _fits(evaluator: Evaluator, context: EvalContext) -> bool:
    try:
        _check(evaluator, context)
    except ConfigError:
        return False
    return True


def _check(evaluator: Evaluator, context: EvalContext) -> None:
    """Raise `ConfigError` if `evaluator` cannot run in `context`, or a head has other classes than the source."""
    source = evaluator.check(context)
    images = 1 if evaluator.encodes_single_images else source.images_per_record
    if images != context.task.images_per_record:
        raise ConfigError(f"{type(evaluator).__name__}.source is {source.name!r}, with {source.images_per_record} "
                          f"images per record; expected {context.task.images_per_record}")


def measure(context: EvalContext, evaluator: Evaluator, with_predictions: bool = False) -> Result:
    """Run `evaluator` and sum up what it measured."""
    context = replace(context, outcomes=[], examples=[])
    source, fields = context.source_of(evaluator), {field.name for field in dataclasses.fields(evaluator)}
    runs = replace(evaluator, examples=0) if "examples" in fields else evaluator         # nothing here shows them
    with contextlib.nullcontext() if context.mesh is None else jax.set_mesh(context.mesh):
        metrics = {name.removeprefix(f"{evaluator.prefix}/"): value for name, value in runs.run(context)
                   if not name.startswith(FIGURE)}
    intervals: dict[str, tuple[float, float]] = {}
    per_class: dict[str, float] = {}
    mistakes: list[Mistake] = []
    predictions: list[tuple[str, str, str]] = []
    for number, outcomes in enumerate(context.outcomes):
        recall = None
        if outcomes.labels is not None:
            first, values = next(iter(outcomes.values.items()))
            recall = first.removesuffix("top1") + "mean_recall"
            per_class = class_accuracies(values, outcomes.labels, source.classes)
            metrics[recall] = float(np.mean(list(per_class.values())))
        per_class = per_class if outcomes.per_class is None else dict(outcomes.per_class)
        intervals |= bootstrap(outcomes, recall, seed=number)
        mistakes += _mistakes(source, outcomes)
        predictions += _predictions(source, outcomes) if with_predictions else ()
    name = next((name for name, kind in EVALUATORS.items() if type(evaluator) is kind), type(evaluator).__name__)
    return Result(source=source.name, evaluator=name, records=len(source), metrics=metrics, intervals=intervals,
                  per_class=per_class, mistakes=tuple(mistakes), predictions=tuple(predictions))


def class_accuracies(values: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Return the mean of `values` [n] for each class of `labels` [n] that occurs; equal names are numbered."""
    right, count = np.bincount(labels, values, len(classes)), np.bincount(labels, minlength=len(classes))
    named: dict[str, float] = {}
    for label in np.flatnonzero(count).tolist():
        name = classes[label] if classes[label] not in named else f"{classes[label]} ({label})"
        named[name] = float(right[label] / count[label])
    return named


def bootstrap(outcomes: Outcomes, recall: str | None = None, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the ends of the interval of every metric, by resampling the examples; `recall` names the mean recall."""
    names = list(outcomes.values)
    if not names or not len(outcomes.values[names[0]]):
        return {}
    values = np.stack([outcomes.values[name] for name in names], axis=1).astype(float)
    rng, count, labels = np.random.default_rng(seed), len(values), outcomes.labels
    means = np.empty((RESAMPLES, len(names) + (recall is not None)))
    for row in range(RESAMPLES):
        drawn = rng.integers(count, size=count)
        means[row, :len(names)] = values[drawn].mean(axis=0)
        if recall is not None:
            size = np.bincount(labels[drawn])
            means[row, -1] = (np.bincount(labels[drawn], values[drawn, 0])[size > 0] / size[size > 0]).mean()
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
    return dict(zip((*names, recall), zip(low.tolist(), high.tolist(), strict=True), strict=False))


def _mistakes(source: Source, outcomes: Outcomes) -> Iterator[Mistake]:
    """Yield evenly spaced examples for which the first metric is below one half."""
    if outcomes.describe is None or not outcomes.values or outcomes.index is None:
        return
    wrong = np.flatnonzero(next(iter(outcomes.values.values())) < 0.5)
    for row in wrong[evenly_spaced(len(wrong), MISTAKES)].tolist() if len(wrong) else ():
        expected, predicted = outcomes.describe(row)
        record = int(outcomes.index[row])
        yield Mistake(record=record, key=record_key(source, record), expected=expected, predicted=predicted)


def _predictions(source: Source, outcomes: Outcomes) -> Iterator[tuple[str, str, str]]:
    if outcomes.describe is not None and outcomes.index is not None:
        for row, record in enumerate(outcomes.index.tolist()):
            yield (record_key(source, record), *outcomes.describe(row))
