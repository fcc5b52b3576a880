"""Train a model: a run from its configuration to its report, exactly resumable at any step."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmm import hosts
from jaxmm.checkpoints import Checkpoints
from jaxmm.config import TrainConfig
from jaxmm.data.bad_records import FaultCounter
from jaxmm.data.pipeline import train_batches
from jaxmm.evals.context import FIGURE
from jaxmm.optional import require_extra
from jaxmm.paths import user_path
from jaxmm.pretrained.warm_start import start_weights
from jaxmm.sharding import host_share, place_batch, unsharded_dims
from jaxmm.training.logs import MetricLog, Progress, duration
from jaxmm.training.report import read_metrics, write_report
from jaxmm.training.runtime import Interrupted, Termination
from jaxmm.training.setup import Setup, prepare
from jaxmm.training.shared_bad_records import SharedFaults
from jaxmm.training.state import State, sharded_state
from jaxmm.training.step import compile_step
from jaxmm.training.workdir import lock_workdir

INPUTS = ("image", "tokens", "label", "image_id", "text_id", "answers", "answer_weight")
"""Parts of a batch that go to the devices."""
Observer = Callable[[int, dict[str, np.ndarray]], None]


class TrainError(RuntimeError):
    """A run cannot continue. The message names the step and the last good checkpoint."""


class OutOfMemory(TrainError):
    """The devices have too little memory for a run."""


def train(config: TrainConfig, workdir: Path | str, *, observe: Observer | None = None) -> dict[str, float]:
    """Run `config` in `workdir`, from where it was left, and return the last evaluation's metrics.

    `observe(step, batch)` gets this host's batches as they are used, with `index` and `fault` of each record. On
    SIGTERM or Ctrl-C the state is saved and {} is returned. Raises `ConfigError`, `DataError`, `CheckpointError` and
    `TrainError`; if memory is short, its kind `OutOfMemory`.
    """
    require_extra("train", "training")
    workdir = user_path(workdir, "workdir")
    with lock_workdir(workdir):
        hosts.heartbeat("starting", 0)
        setup = prepare(config, workdir)
        with (jax.set_mesh(setup.mesh), _named_memory_errors(), Termination() as termination,
              contextlib.ExitStack() as closing):
            metrics = Run(setup, termination, observe, closing).run()
        hosts.barrier("end of the run")  # what the first host has written is there
        return metrics


@contextlib.contextmanager
def _named_memory_errors() -> Iterator[None]:
    """Turn the errors of compilers and allocators for want of memory into `OutOfMemory`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(f"the run does not fit into memory: {str(error).strip().splitlines()[0]}") from error


class Run:
    """A run in progress: its state, its data, and where results are written."""

    def __init__(self, setup: Setup, termination: Termination, observe: Observer | None,
                 closing: contextlib.ExitStack):
        """Restore the newest checkpoint or make the first state; `closing` closes what was opened."""
        config, primary = setup.config, jax.process_index() == 0
        self.setup, self.config, self.termination, self.observe = setup, config, termination, observe
        self.checkpoints = Checkpoints(setup.workdir / "checkpoints", keep=config.checkpoint.keep,
                                       best=config.checkpoint.best is not None)
        closing.callback(self.checkpoints.close)
        self.checkpoints.clean()
        self.faults = SharedFaults(FaultCounter(setup.train, config.data.max_bad), jax.process_count())
        self.batches = train_batches(setup.train, config.data, setup.tokenizer, seed=config.seed,
                                     shard=host_share(setup.mesh), labels="label" in setup.task.reads)
        closing.callback(self.batches.close)
        self.state, reinitialised = self._restore()
        self.rng = jax.random.fold_in(jax.random.key(config.seed), 1)
        self.start = int(jax.device_get(self.state.step))
        self.log = closing.enter_context(contextlib.closing(MetricLog(setup.workdir, self.start))) if primary else None
        self.progress = closing.enter_context(contextlib.closing(
            Progress(config.steps, config.data.batch_size, self.start, quiet=not primary)))
        self.unchecked: tuple[int, dict] | None = None  # a step whose metrics nobody has looked at yet
        self.position = self._position()
        self._introduce(reinitialised)

    def _restore(self) -> tuple[State, list[str]]:
        """Return the newest checkpoint, or the state before the first step with the paths that no trained model gave.
        """
        hosts.heartbeat("restoring")
        setup, init = self.setup, self.config.init
        restored = self.checkpoints.restore(setup.like)
        if restored is None:
            loaded, reinitialised = ({}, []) if init.source is None else start_weights(init, setup.task, setup.mesh)
            return sharded_state(setup.task, setup.optimizer, self.config.seed, setup.like, loaded), reinitialised
        state, data = restored
        self.batches.set_state(data["iterator"])
        self.faults.counter.set_state(data["faults"])
        return state, []

    def _introduce(self, reinitialised: list[str]) -> None:
        setup, say = self.setup, self.progress.print
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        say(f"{setup.workdir}: {count:,} parameters, {len(setup.train):,} training records, mesh "
            f"{dict(setup.mesh.shape)}, " + (f"going on after step {self.start}" if self.start else "from the start"))
        if self.config.init.source is not None and not self.start:
            shown = ", ".join(reinitialised[:8]) + (" ..." if len(reinitialised) > 8 else "")
            say(f"parameters are those of {self.config.init.source}" + (f"; initialised: {shown}" if shown else ""))
        if odd := unsharded_dims(self.state.params, setup.mesh):
            say(f"{len(odd)} dimensions are not sharded; {odd[0]}")

    def run(self) -> dict[str, float]:
        """Train to the end, evaluate and write the report; return the metrics, or {} if asked to stop before."""
        metrics, examples = {}, []
        try:
            stopped = self.train_steps()
            hosts.heartbeat("saving")
            self.checkpoints.wait()
            if not stopped:
                metrics, examples = self.evaluate()
        except Interrupted:  # in an evaluation, which the run does when it goes on
            stopped = True
            self.checkpoints.save(self.state, self.position)
            self.checkpoints.wait()
        if stopped:
            self.progress.print(f"stopped after step {int(self.state.step)} as asked, everything is saved; "
                                "the same command goes on from there")
            return {}
        if self.faults.counter.bad:
            self.progress.print(self.faults.counter.summary())
        if self.log is not None:
            report = write_report(self.setup.workdir, examples)
            self.progress.print(list_metrics(metrics) or "no evaluation")
            self.progress.print(f"report: {report}")
        return metrics

    def train_steps(self) -> bool:
        """Train to the last step, or until asked to stop; return whether that was asked."""
        config, every = self.config, self.config.checkpoint.every
        step_fn = compile_step(self.setup.task, self.setup.optimizer, self.setup.mesh, self.state,
                               microbatches=config.microbatches, skip_nonfinite=config.nonfinite == "skip")
        if self._evaluation_is_missing():
            self.evaluate()
        loss = None
        try:
            upcoming = self._fetch() if self.start < config.steps else None
        except Interrupted:
            return True
        for step in range(self.start + 1, config.steps + 1):
            last = step == config.steps
            evaluating = bool(config.eval_every) and step % config.eval_every == 0 and not last
            logging = step % config.log_every == 0 or last
            if logging or evaluating or step % every == 0:
                self.faults.share()
            (host_batch, batch), bad_records = upcoming, self.faults.counter.bad
            self.position = self._position()
            hosts.heartbeat("compiling" if step == self.start + 1 else "training", step,
                            blocking=step > self.start + 1)
            self.state, metrics = step_fn(self.state, batch, self.rng)
            hosts.heartbeat("training")
            if self.observe is not None:
                self.observe(step, host_batch)
            try:
                upcoming = None if last else self._fetch()
            except Interrupted:  # this step is the last one
                upcoming = None
            self._check()  # of the step before, so that the device never waits for the host
            self.unchecked = step, metrics
            stopping = self.termination.agreed()  # read once: the signal may come at any line
            saving = step % every == 0 or last or stopping or (evaluating and config.checkpoint.best is not None)
            if logging or saving or evaluating:
                self._check()
            self.progress.step(step, loss)
            if logging:
                loss = self._log(step, metrics, bad_records)
            if stopping:  # whoever ends the process during the save leaves the one before it
                self.progress.print(f"saving step {step}, as asked to stop; {self.checkpoints.describe_last()}")
            if saving:
                hosts.heartbeat("saving")
                if self.log is not None:
                    self.log.flush()  # a run that goes on from this checkpoint has all metrics before it
                self.checkpoints.save(self.state, self.position)
            if stopping:
                return True
            if evaluating:
                self.evaluate()
        return False

    def _position(self) -> dict[str, Any]:
        """Return where the data is, for a checkpoint of the step whose batch is not trained on yet."""
        return {"iterator": self.batches.get_state(), "faults": self.faults.counter.get_state()}

    def _evaluation_is_missing(self) -> bool:
        """Return whether the run was ended after its checkpoint and before the evaluation of that step was logged."""
        every = self.config.eval_every
        if not every or not self.setup.evals or self.start % every or not 0 < self.start < self.config.steps:
            return False
        history = read_metrics(self.setup.workdir / "metrics.jsonl")
        logged = any(points[-1][0] == self.start for name, points in history.items()
                     if not name.startswith(("train/", "data/")))
        return not hosts.of_first("evaluation", logged)

    def _fetch(self) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
        """Return the next batch, as it was read and on the devices."""
        hosts.heartbeat("reading data")
        with self.termination.interruptible():
            batch = next(self.batches)
        self.faults.update(batch)
        hosts.heartbeat("training")
        return batch, place_batch({name: batch[name] for name in INPUTS if name in batch}, self.setup.mesh)

    def _check(self) -> None:
        """Raise `TrainError` if the unchecked step was not finite, unless such steps are skipped."""
        if self.unchecked is None:
            return
        (step, metrics), self.unchecked = self.unchecked, None
        with hosts.waiting("training"):
            finite = jax.device_get(metrics["finite"])
        if finite:
            return
        self.checkpoints.wait()
        steps, metrics = self.checkpoints.steps(), jax.device_get(metrics)
        what = f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
        good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
        if self.config.nonfinite == "stop":
            raise TrainError(f"{what}; {good}. To skip such steps: --nonfinite skip")
        self.progress.print(f"{what}: skipped")
        if metrics["skips"] >= self.config.max_skips:
            raise TrainError(f"{what}: {self.config.max_skips} steps in a row were skipped; {good}")

    def _log(self, step: int, metrics: dict[str, jax.Array], bad_records: int) -> float:
        """Write a line of metrics; return the loss."""
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items() if name != "finite"}
        speed = self.progress.steps_per_second(step) * self.config.data.batch_size
        if self.log is not None:
            self.log.write(step, values | {"train/pictures_per_second": speed, "data/bad_records": bad_records})
        return values["train/loss"]

    def evaluate(self) -> tuple[dict[str, float], list[Any]]:
        """Run the evaluators and log what they yield; return that, and examples for the report."""
        since, step, context = time.monotonic(), int(jax.device_get(self.state.step)), self.setup.context(self.state)
        hosts.heartbeat("evaluating", step)
        with self.termination.interruptible():
            metrics = {name: value for evaluator in self.setup.evals for name, value in evaluator.run(context)}
        if self.log is not None and metrics:
            self.log.write(step, metrics)
            self.log.flush()
        best = self.config.checkpoint.best
        if best is not None:
            self.checkpoints.record_metric(step, -metrics[best] if best.endswith("loss") else metrics[best])
        spent = time.monotonic() - since
        self.progress.pause(spent)
        if step < self.config.steps:
            self.progress.print(f"step {step}, evaluated in {duration(spent)}: {list_metrics(metrics)}")
        return metrics, context.examples


def list_metrics(metrics: dict[str, float]) -> str:
    """Return names and values in one line, without those that only a figure shows."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith(FIGURE))
