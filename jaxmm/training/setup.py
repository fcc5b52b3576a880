"""Prepare a run: open its sources, bind its task to them, check everything that can be checked before compiling."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmm import hosts
from jaxmm.config import Evaluator, ImageConfig, TrainConfig
from jaxmm.data.base import Source, record_texts
from jaxmm.data.eval_pipeline import read_images
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tokenizers import SETTINGS, Tokenizer, make_tokenizer
from jaxmm.evals.context import EvalContext, evenly_spaced
from jaxmm.evals.opened_sources import OpenedSources
from jaxmm.pretrained.warm_start import adopt, open_start, with_longer_texts
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.sharding import host_share, make_mesh, with_shardings
from jaxmm.task import Task
from jaxmm.training.accumulate import check_parts
from jaxmm.training.optimizer import Optimizer, make_optimizer
from jaxmm.training.report import read_metrics
from jaxmm.training.state import State, abstract_state
from jaxmm.training.workdir import read_run_config, write_run_config
from jaxmm.validation import ConfigError, require

CORPUS = 200_000
"""Largest number of records whose texts a tokenizer is trained on."""


@dataclass(frozen=True)
class Setup:
    """Everything that a run consists of before its first step."""

    config: TrainConfig
    workdir: Path
    task: Task
    optimizer: Optimizer
    train: Source
    val: Source | None
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh
    evals: tuple[Evaluator, ...]
    """Evaluators of `config` that have something to measure on."""
    like: State
    """Shapes and shardings of the state."""
    sources: OpenedSources = dataclasses.field(default_factory=OpenedSources)
    """The sources of evaluators, which stay open between evaluations."""

    def context(self, state: State) -> EvalContext:
        """Return the arguments of evaluators."""
        return EvalContext(task=self.task, params=state.params, average=state.average, data=self.config.data,
                           train=self.train, val=self.val, sources=self.sources, tokenizer=self.tokenizer,
                           mesh=self.mesh, history=partial(read_metrics, self.workdir / "metrics.jsonl"))


def prepare(config: TrainConfig, workdir: Path) -> Setup:
    """Open the sources, bind the task to them, check the whole run, and write `config.json`."""
    mesh = make_mesh(config.mesh)
    require({device.process_index for device in mesh.devices.flat} == set(range(jax.process_count())), "mesh",
            dict(mesh.shape), f"devices of all {jax.process_count()} hosts")
    host_share(mesh)
    check_parts(config, mesh)
    train, val = _open_sources(config)
    notes = read_run_config(config, workdir, train)
    task, tokenizer = _bind_task(config, workdir, train, notes)
    params = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, params, config.steps, task.clamps)
    evals = tuple(evaluator for evaluator in config.evals if val is not None or evaluator.source is not None)
    like = with_shardings(abstract_state(task, optimizer), mesh)
    setup = Setup(config, workdir, task, optimizer, train, val, tokenizer, mesh, evals, like)
    _check_evals(setup)
    hosts.assert_same_on_all_hosts(config=to_dict(config), task=to_dict(task), records=train.fingerprint,
                                   words=None if tokenizer is None else tokenizer.fingerprint)
    hosts.barrier("begin")  # all hosts have read what was in the workdir
    if jax.process_index() == 0:
        write_run_config(config, task, workdir, train, tokenizer)
    hosts.barrier("begun")
    hosts.wait_for_path("workdir", workdir / "config.json")
    return setup


def _open_sources(config: TrainConfig) -> tuple[Source, Source | None]:
    """Return the sources of training and validation. Raises `ConfigError` if they do not fit the task."""
    data, task = config.data, config.task
    train = open_source(data.train, data_dir=data.data_dir)
    require("answers" not in task.reads or train.most_answers, "data.train", data.train,
            "a source of questions with answers, such as vqa:DIR or vqa:FILE.json")
    require(data.questions == 1 or "answers" in task.reads, "data.questions", data.questions,
            f"1: {type(task).__name__} reads no questions")
    require(data.captions == 1 or task.several_captions, "data.captions", data.captions,
            f"1: {type(task).__name__} reads one text per image, or none")
    require(not data.origins or train.has_origins, "data.origins", data.origins,
            f"(): {train.name} does not say where its texts come from")
    val = open_source(data.val, data_dir=data.data_dir) if data.val else None
    if val is not None and None not in (train.classes, val.classes) and train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError(f"data.val is {data.val!r}, whose classes are not those of {data.train!r}: "
                          f"{', '.join(odd[:10])} only in one of them")
    for field, source in (("train", train), ("val", val)):
        if source is not None:
            require(source.images_per_record == task.images_per_record, f"data.{field}", source.name,
                    f"a source with {task.images_per_record} images per record, not {source.images_per_record}")
    return train, val


def _bind_task(
    config: TrainConfig, workdir: Path, train: Source, notes: dict[str, Any] | None
) -> tuple[Task, Tokenizer | None]:
    """Return the task with what the data knows filled in, and the tokenizer; `notes` are those of a run that continues.
    """
    task, tokenizer, start = config.task, None, config.init.source
    if start is not None and notes is None:
        trained = open_start(config.init)
        task, tokenizer = adopt(task, trained.task, config.data.image.size), trained.tokenizer
        if config.init.context_length is not None:
            task, tokenizer = with_longer_texts(task, tokenizer, config.init.context_length)
    if "text" not in task.reads:
        tokenizer = None
    elif tokenizer is None:
        tokenizer = _make_tokenizer(config, task, train, workdir)
    fits = type(task).fit is not Task.fit
    if notes is not None and (fits or start is not None):  # the trained model may be gone by now
        task = from_dict(notes["task"], workdir / "config.json")
    else:
        task = task.bind(image_size=config.data.image.size, tokenizer=tokenizer,
                         classes=None if train.classes is None else len(train.classes))
        task = task.fit(partial(_sample, train, config.data.image))
    return task.with_steps(config.steps), tokenizer


def _sample(source: Source, image: ImageConfig, count: int) -> np.ndarray:
    """Return up to `count` evenly spaced images of `source`, uint8 [n size size 3], without unreadable ones."""
    return read_images(source, image, evenly_spaced(len(source), count).tolist())[1]


def _make_tokenizer(config: TrainConfig, task: Task, source: Source, workdir: Path) -> Tokenizer | None:
    """Return the workdir's tokenizer, else a new one; None for a source without texts."""
    folder = workdir / "tokenizer"
    if (folder / SETTINGS).exists():
        try:
            return Tokenizer.load(folder)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if not any(_texts(source, i) for i in range(min(len(source), 100))):
        return None
    tokenizer = config.data.tokenizer
    if config.init.source is not None and task.text_config != config.task.text_config:  # a trained text tower
        if tokenizer.kind.startswith("train-"):
            raise ConfigError(f"init.from is {config.init.source!r}, which came without a vocabulary; expected "
                              "data.tokenizer.kind and .file, such as clip and bpe_simple_vocab_16e6.txt.gz")
        length = task.context_length or tokenizer.context_length
        tokenizer = dataclasses.replace(tokenizer, context_length=length)
    corpus = (text for i in range(min(len(source), CORPUS)) for text in _texts(source, i))
    return make_tokenizer(tokenizer, corpus)


def _texts(source: Source, index: int) -> tuple[str, ...]:
    try:
        return record_texts(source, index)
    except Exception:  # the pipeline counts and names it
        return ()


def _check_evals(setup: Setup) -> None:
    """Raise `ConfigError` if an evaluator cannot run, two give the same name, or none gives that of the best."""
    context, names = setup.context(setup.like), []
    for evaluator in setup.evals:
        evaluator.check(context)
        names += evaluator.metrics(context)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    require(not repeated, "evals", ", ".join(repeated), "different names: give one of the evaluators another prefix")
    best = setup.config.checkpoint.best
    require(best is None or best in names, "checkpoint.best", best, f"one of {', '.join(names) or 'no metrics'}")
