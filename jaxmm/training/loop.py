"""A run from its configuration to its report, exactly resumable at any step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import jax
import numpy as np

from jaxmm import hosts
from jaxmm.checkpoints import Checkpoints
from jaxmm.config import ConfigError, Evaluator, TrainConfig, from_dict, require, to_dict
from jaxmm.data.base import Source, record_texts
from jaxmm.data.pipeline import FaultCounter, TrainIterator, train_batches
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tokenizers import Tokenizer, make_tokenizer
from jaxmm.evals.context import EvalContext
from jaxmm.optional import require_extra
from jaxmm.pretrained.warm_start import adopt, open_start, start_weights
from jaxmm.sharding import host_share, make_mesh, place_batch, unsharded_dims, with_shardings
from jaxmm.task import Task
from jaxmm.training.accumulate import check_parts
from jaxmm.training.logs import MetricLog, Watch, duration
from jaxmm.training.optimizer import Optimizer, make_optimizer
from jaxmm.training.report import write_report
from jaxmm.training.runtime import Termination
from jaxmm.training.shared_bad_records import SharedFaults
from jaxmm.training.state import State, abstract_state, sharded_state
from jaxmm.training.step import compile_step
from jaxmm.training.workdir import begin, begun

INPUTS = ("image", "tokens", "label", "image_id", "text_id", "answers", "answer_weight")
"""What of a batch goes to the devices."""
CORPUS = 200_000
"""Records whose texts a tokenizer is trained on, at most."""
class TrainError(RuntimeError):
    """A run that cannot go on. The message names the step and what is left."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a run consists of before its first step."""

    config: TrainConfig
    workdir: Path
    task: Task
    optimizer: Optimizer
    train: Source
    val: Source | None
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh
    evals: tuple[Evaluator, ...]
    """Those of `config` that have something to measure on."""
    like: State
    """Shapes and shardings of the state."""


def train(
    config: TrainConfig, workdir: Path | str, *, observe: Callable[[int, dict[str, np.ndarray]], None] | None = None
) -> dict[str, float]:
    """Runs `config` in `workdir`, from where it was left, and returns the last evaluation's metrics.

    `observe(step, batch)` sees this host's batches as they are used, `index` and `fault` of each record included.
    On SIGTERM or Ctrl-C the state is saved and {} is returned. Raises `ConfigError`, `DataError`, `CheckpointError` and
    `TrainError`.
    """
    require_extra("train", "training")
    workdir = Path(workdir)
    primary = jax.process_index() == 0
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / ".lock").acquire(blocking=False) if primary else contextlib.nullcontext()
    except filelock.Timeout:
        raise ConfigError(f"workdir is {str(workdir)!r}, which another run is writing to") from None
    except OSError as error:
        raise ConfigError(f"workdir is {str(workdir)!r}, which cannot be written: {error}") from None
    with lock:
        hosts.heartbeat("starting", 0)
        setup = prepare(config, workdir)
        with jax.set_mesh(setup.mesh), Termination() as termination:
            metrics = _run(setup, termination, observe)
        hosts.barrier("end of the run")  # what the first host has written is there
        return metrics


def prepare(config: TrainConfig, workdir: Path) -> Setup:
    """Opens the sources and binds the task to them; checks all that can be checked before compiling."""
    mesh = make_mesh(config.mesh)
    require({device.process_index for device in mesh.devices.flat} == set(range(jax.process_count())), "mesh",
            dict(mesh.shape), f"devices of all {jax.process_count()} hosts")
    host_share(mesh)
    check_parts(config, mesh)
    source = open_source(config.data.train, data_dir=config.data.data_dir)
    began = begun(config, workdir, source)
    require("answers" not in config.task.reads or getattr(source, "most_answers", 0), "data.train", config.data.train,
            "a source of questions with answers, such as vqa:DIR or vqa:FILE.json")
    require(config.data.questions == 1 or "answers" in config.task.reads, "data.questions", config.data.questions,
            f"1: {type(config.task).__name__} reads no questions")
    val = open_source(config.data.val, data_dir=config.data.data_dir) if config.data.val else None
    if val is not None and None not in (source.classes, val.classes) and source.classes != val.classes:
        odd = sorted(set(source.classes) ^ set(val.classes))
        raise ConfigError(f"data.val is {config.data.val!r}, whose classes are not those of {config.data.train!r}: "
                          f"{', '.join(odd[:10])} only in one of them")
    for name, each in (("train", source), ("val", val)):
        count = 1 if each is None else getattr(each, "pictures", 1)
        require(each is None or count == config.task.images_per_record, f"data.{name}", getattr(each, "name", None),
                f"a source with {config.task.images_per_record} pictures a record, not {count}")
    task, trained = config.task, None
    if config.init.source is not None and began is None:
        trained = open_start(config.init)
        task = adopt(task, trained.task, config.data.image.size)
    tokenizer = None
    if "text" in task.reads:
        tokenizer = (trained and trained.tokenizer) or _tokenizer(config, task, source, workdir)
    if config.init.source is not None and began is not None:  # the trained model may be gone by now
        task = from_dict(began["task"], workdir / "config.json")
    else:
        task = task.bind(image_size=config.data.image.size, tokenizer=tokenizer,
                         classes=None if source.classes is None else len(source.classes))
    task = task.with_steps(config.steps)
    params = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, params, config.steps, task.bounds)
    evals = tuple(evaluator for evaluator in config.evals if val is not None or evaluator.source is not None)
    like = with_shardings(abstract_state(task, optimizer), mesh)
    setup = Setup(config, workdir, task, optimizer, source, val, tokenizer, mesh, evals, like)
    _check_evals(setup)
    hosts.assert_same_on_all_hosts(config=to_dict(config), records=source.fingerprint,
                     words=None if tokenizer is None else tokenizer.fingerprint)
    hosts.barrier("begin")  # nobody reads any more what was there before
    if jax.process_index() == 0:
        begin(config, task, workdir, source, tokenizer)
    hosts.barrier("begun")
    hosts.wait_for_path("workdir", workdir / "config.json")
    return setup


def _check_evals(setup: Setup) -> None:
    """Raises `ConfigError` where an evaluator cannot run, where two give the same name, or none the best's."""
    context, seen = _context(setup, setup.like), []
    for evaluator in setup.evals:
        evaluator.check(context)
        seen += evaluator.metrics(context)
    twice = sorted({name for name in seen if seen.count(name) > 1})
    require(not twice, "evals", ", ".join(twice), "different names: give one of the evaluators another prefix")
    best = setup.config.checkpoint.best
    require(best is None or best in seen, "checkpoint.best", best, f"one of {', '.join(seen) or 'no metrics'}")


def _context(setup: Setup, state: State) -> EvalContext:
    """What evaluators see."""
    return EvalContext(task=setup.task, params=state.params, average=state.average, data=setup.config.data,
                       train=setup.train, val=setup.val, tokenizer=setup.tokenizer, mesh=setup.mesh)


def _tokenizer(config: TrainConfig, task: Task, source: Source, workdir: Path) -> Tokenizer | None:
    """The work folder's tokenizer, else a new one; None for a source without words."""
    folder = workdir / "tokenizer"
    if folder.exists():
        try:
            return Tokenizer.load(folder)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    some = next((texts for i in range(min(len(source), 100)) if (texts := _texts(source, i))), ())
    if not some:
        return None
    wanted = config.data.tokenizer
    if config.init.source is not None and task.text_config != config.task.text_config:  # a trained text tower
        if wanted.kind.startswith("train-"):
            raise ConfigError(f"init.from is {config.init.source!r}, which came without a vocabulary; wanted "
                              "data.tokenizer.kind and .file, such as clip and bpe_simple_vocab_16e6.txt.gz")
        length = task.context_length or wanted.context_length
        wanted = dataclasses.replace(wanted, context_length=length)
    corpus = (text for i in range(min(len(source), CORPUS)) for text in _texts(source, i))
    return make_tokenizer(wanted, corpus)


def _texts(source: Source, index: int) -> tuple[str, ...]:
    try:
        return record_texts(source, index)
    except Exception:  # the pipeline counts and names it
        return ()


def _run(setup: Setup, termination: "Termination", observe) -> dict[str, float]:
    config, workdir = setup.config, setup.workdir
    primary = jax.process_index() == 0
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep,
                              best=config.checkpoint.best is not None)
    faults = SharedFaults(FaultCounter(setup.train, config.data.max_bad), jax.process_count())
    with contextlib.ExitStack() as closing:
        closing.callback(checkpoints.close)
        checkpoints.clean()
        batches = train_batches(setup.train, config.data, setup.tokenizer, seed=config.seed,
                                shard=host_share(setup.mesh), labels="label" in setup.task.reads)
        closing.callback(batches.close)
        state, anew = _restore(setup, checkpoints, batches, faults)
        start = int(state.step)
        metric_log = closing.enter_context(contextlib.closing(MetricLog(workdir, start))) if primary else None
        watch = closing.enter_context(contextlib.closing(
            Watch(config.steps, config.data.batch_size, start, quiet=not primary)))
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        watch.say(f"{workdir}: {count:,} parameters, {len(setup.train):,} training records, "
                  f"mesh {dict(setup.mesh.shape)}, " + (f"going on after step {start}" if start else "from the start"))
        if config.init.source is not None and not start:
            watch.say(f"parameters are those of {config.init.source}"
                      + (f"; anew: {', '.join(anew[:8])}{' ...' if len(anew) > 8 else ''}" if anew else ""))
        if odd := unsharded_dims(state.params, setup.mesh):
            watch.say(f"{len(odd)} dimensions are not cut; {odd[0]}")
        state, stopped = _steps(setup, state, batches, faults, checkpoints, watch, metric_log, termination, observe)
        if stopped:
            watch.say(f"stopped after step {int(state.step)} as asked, everything is saved; "
                      "the same command goes on from there")
            return {}
        metrics, examples = _evaluate(setup, state, metric_log, watch, checkpoints)
        if faults.counter.bad:
            watch.say(faults.counter.summary())
        if primary:
            report = write_report(workdir, examples)
            watch.say(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "no evaluation")
            watch.say(f"report: {report}")
        return metrics


def _restore(
    setup: Setup, checkpoints: Checkpoints, batches: TrainIterator, faults: SharedFaults
) -> tuple[State, list[str]]:
    """The newest whole checkpoint on this run's mesh, or the state before the first step and the paths of the
    parameters that no trained model gave."""
    hosts.heartbeat("restoring")
    found = checkpoints.restore(setup.like)
    if found is None:
        init, anew, given = setup.config.init, [], {}
        if init.source is not None:
            given, anew = start_weights(init, setup.task, setup.mesh)
        return sharded_state(setup.task, setup.optimizer, setup.config.seed, setup.like, given), anew
    state, data = found
    batches.set_state(data["iterator"])
    faults.counter.set_state(data["faults"])
    return state, []


def _steps(setup, state, batches, faults, checkpoints, watch, metric_log, termination, observe) -> tuple[State, bool]:
    """Trains to the last step, or until asked to stop: then the second result is True."""
    config = setup.config
    step_fn = compile_step(setup.task, setup.optimizer, setup.mesh, state, microbatches=config.microbatches,
                           skip_nonfinite=config.nonfinite == "skip")
    rng = jax.random.fold_in(jax.random.key(config.seed), 1)
    start, best = int(state.step), config.checkpoint.best

    def fetch():
        hosts.heartbeat("reading data")
        batch = next(batches)
        faults.update(batch)
        hosts.heartbeat("training")
        return batch, place_batch({name: batch[name] for name in INPUTS if name in batch}, setup.mesh)

    def check(step, metrics):
        hosts.heartbeat("training", blocking=True)
        finite = bool(metrics["finite"])
        hosts.heartbeat("training")
        if finite:
            return
        checkpoints.wait()
        last = checkpoints.steps()
        what = f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
        good = f"the last good checkpoint is of step {last[-1]}" if last else "there is no checkpoint yet"
        if config.nonfinite == "stop":
            raise TrainError(f"{what}; {good}. To skip such steps: --nonfinite skip")
        watch.say(f"{what}: skipped")
        if int(metrics["skips"]) >= config.max_skips:
            raise TrainError(f"{what}: {config.max_skips} steps in a row were skipped; {good}")

    pending, checked_loss, stopping = None, None, False
    upcoming = fetch() if start < config.steps else None
    for step in range(start + 1, config.steps + 1):
        evaluating = config.eval_every and step % config.eval_every == 0 and step < config.steps
        writing = step % config.log_every == 0 or step == config.steps
        if writing or evaluating or step % config.checkpoint.every == 0:
            faults.share()
        (host_batch, batch), position = upcoming, {"iterator": batches.get_state(),
                                                   "faults": faults.counter.get_state()}
        bad_records = faults.counter.bad
        hosts.heartbeat("compiling" if step == start + 1 else "training", step, blocking=step > start + 1)
        state, metrics = step_fn(state, batch, rng)
        hosts.heartbeat("training")
        if observe is not None:
            observe(step, host_batch)
        upcoming = fetch() if step < config.steps else None
        if pending is not None:  # one step late, so that the device never waits for the host
            check(*pending)
        pending = step, metrics
        stopping = termination.agreed()  # read once: the signal may come at any line
        saving = (step % config.checkpoint.every == 0 or step == config.steps or stopping
                  or bool(evaluating and best))
        if writing or saving or evaluating:
            check(*pending)
            pending = None
        watch.step(step, checked_loss)
        if writing:
            values = {f"train/{name}": float(value) for name, value in metrics.items() if name != "finite"}
            checked_loss = values["train/loss"]
            values |= {"train/pictures_per_second": watch.rate(step) * config.data.batch_size,
                       "data/bad_records": bad_records}
            if metric_log is not None:
                metric_log.write(step, values)
        if saving:
            hosts.heartbeat("saving")
            checkpoints.save(state, position)
        if stopping:
            checkpoints.wait()
            break
        if evaluating:
            _evaluate(setup, state, metric_log, watch, checkpoints)
    hosts.heartbeat("saving")
    checkpoints.wait()
    return state, stopping


def _evaluate(setup, state, metric_log, watch, checkpoints) -> tuple[dict[str, float], list]:
    """Runs the evaluators and writes down what they yield. Returns that, and examples for the report."""
    begun, step, context = time.monotonic(), int(state.step), _context(setup, state)
    hosts.heartbeat("evaluating", step)
    metrics = {name: value for evaluator in setup.evals for name, value in evaluator.run(context)}
    if metric_log is not None and metrics:
        metric_log.write(step, metrics)
    best = setup.config.checkpoint.best
    if best is not None:
        checkpoints.rate(step, -metrics[best] if best.endswith("loss") else metrics[best])
    spent = time.monotonic() - begun
    watch.pause(spent)
    if step < setup.config.steps:
        watch.say(f"step {step}, evaluated in {duration(spent)}: "
                  + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics, context.examples
