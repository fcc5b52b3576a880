import itertools
import json
import os
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import chex
import filelock
import jax
import numpy as np
import pytest

from jaxmm.checkpoints import CheckpointError, Checkpoints
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import CheckpointConfig, DataConfig, Evaluator, ImageConfig, MeshConfig, TokenizerConfig
from jaxmm.data.base import DataError
from jaxmm.evals import TopKAccuracy
from jaxmm.saved_config import to_dict
from jaxmm.training import loop
from jaxmm.training.loop import TrainError, train
from jaxmm.validation import ConfigError
from tests.training.common import (
    LINEAR,
    Linear,
    Plain,
    Steep,
    assert_same_bits,
    clip_run,
    lines,
    poison,
    restored,
)


@dataclass(frozen=True, kw_only=True)
class Scripted(Evaluator):
    """Yields one of `grades` at a time."""

    grades: tuple[float, ...]
    name: str = "val/grade"
    biases: ClassVar[list] = []

    def check(self, context):
        pass

    def metrics(self, context):
        return (self.name,)

    def run(self, context):
        self.biases.append(np.array(context.params["head"]["bias"]))
        yield self.name, self.grades[len(self.biases) - 1]


def graded(*grades, **fields):
    Scripted.biases.clear()
    return replace(LINEAR, evals=(Scripted(grades=grades),), data=replace(LINEAR.data, val="digits:test"), **fields)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """An undisturbed run of 12 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    train(LINEAR, workdir)
    return workdir


def test_a_work_folder_holds_what_it_should(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} >= {"config.json", "metrics.jsonl", "tensorboard", "checkpoints",
                                                 "report.html"}
    notes = json.loads((undisturbed / "config.json").read_text())
    assert notes["versions"]["jax"] == jax.__version__ and notes["fingerprint"]
    assert notes["config"] == json.loads(json.dumps(to_dict(LINEAR))) and "cpu" in notes["devices"]
    rows = lines(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {"step", "train/loss", "train/grad_norm", "train/learning_rate", "train/skips",
                            "train/pictures_per_second", "data/bad_records"}
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert Checkpoints(undisturbed / "checkpoints").steps() == [4, 8, 12]
    assert list(undisturbed.glob("*.part")) == []


@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2)], ids=str)
def test_the_loop_traces_its_step_once(mesh, tmp_path, monkeypatch):
    """And moves nothing between host and devices unasked, on one device or several (see `conftest.py`)."""
    chex.clear_trace_counter()
    step, traced = jax.jit, chex.assert_max_traces(n=1)
    monkeypatch.setattr("jaxmm.training.step.jax.jit", lambda fn, **options: step(traced(fn), **options))
    train(replace(LINEAR, mesh=mesh, steps=6, checkpoint=CheckpointConfig(every=2)), tmp_path)
    assert lines(tmp_path)[-1]["step"] == 6


def test_every_batch_is_seen_once_and_in_order(tmp_path):
    used = []
    train(replace(LINEAR, steps=5, log_every=2), tmp_path, observe=lambda step, batch: used.append((step, batch)))
    assert [step for step, _ in used] == [1, 2, 3, 4, 5]
    records = np.concatenate([batch["index"] for _, batch in used])
    assert len(set(records.tolist())) == 5 * 16
    assert [row["step"] for row in lines(tmp_path)] == [2, 4, 5]           # and the last, whatever `log_every`


def test_evaluations_are_logged_and_choose_what_is_kept(tmp_path):
    kept = CheckpointConfig(every=4, keep=1, best="val/grade")
    config = graded(0.3, 0.5, 0.1, steps=8, eval_every=3, checkpoint=kept)
    assert train(config, tmp_path) == {"val/grade": 0.1}
    assert lines(tmp_path, "val/grade") == [(3, 0.3), (6, 0.5), (8, 0.1)]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [6, 8]
    for step, bias in ((6, Scripted.biases[1]), (8, Scripted.biases[2])):      # saved is what was measured
        np.testing.assert_array_equal(restored(tmp_path, step)["params"]["head"]["bias"], bias)


def test_a_metric_that_no_evaluator_yields_is_named(tmp_path):
    config = graded(0.5, steps=1, checkpoint=CheckpointConfig(best="val/top2"))
    with pytest.raises(ConfigError, match=r"checkpoint.best is 'val/top2'; expected one of val/grade"):
        train(config, tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint.best is 'val/grade'; expected one of no metrics"):
        train(replace(LINEAR, checkpoint=CheckpointConfig(best="val/grade")), tmp_path)
    assert Scripted.biases == [] and not (tmp_path / "config.json").exists()


def test_two_evaluators_of_one_name_are_refused(tmp_path):
    config = replace(graded(), evals=(Scripted(grades=()), Scripted(grades=(1.0,))))
    with pytest.raises(ConfigError, match=r"evals is 'val/grade'; expected different names"):
        train(config, tmp_path)


def test_of_losses_the_lowest_is_the_best(tmp_path):
    kept = CheckpointConfig(every=4, keep=1, best="val/loss")
    config = graded(0.5, 0.3, 0.4, 0.9, steps=8, eval_every=2, checkpoint=kept)
    train(replace(config, evals=(replace(config.evals[0], name="val/loss"),)), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 8]


def test_an_evaluator_with_a_source_needs_no_held_out_one(tmp_path):
    Scripted.biases.clear()
    config = replace(LINEAR, steps=1, evals=(Scripted(grades=(0.25,), source="digits:test"), TopKAccuracy()))
    assert train(config, tmp_path) == {"val/grade": 0.25}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    for log_every in (1, 100):                                             # the check may come a step late
        workdir = tmp_path / str(log_every)
        with pytest.raises(TrainError, match=r"^step 6: loss nan, gradient norm nan; the last good checkpoint is of "
                                             r"step 4\. To skip such steps: --nonfinite skip$"):
            train(replace(poison(LINEAR, 6), log_every=log_every), workdir)
        assert Checkpoints(workdir / "checkpoints").steps() == [4]
    with pytest.raises(TrainError, match=r"^step 8: .* step 4\."):         # a bad state is not saved
        train(replace(poison(LINEAR, 8), log_every=100), tmp_path / "saving")
    with pytest.raises(TrainError, match=r"^step 2: .*there is no checkpoint yet"):
        train(poison(LINEAR, 2), tmp_path / "early")


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    with pytest.raises(TrainError, match=r"^step 6: loss \d\.\d+, gradient norm (nan|inf); the last good checkpoint is "
                                         r"of step 4\."):
        train(poison(replace(LINEAR, task=Steep()), 6), tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4]


def test_skipping_goes_on_and_gives_up_after_too_many_in_a_row(tmp_path, capsys):
    skipping = replace(LINEAR, nonfinite="skip", max_skips=3)
    train(poison(skipping, 5, 6, 9), tmp_path / "few")
    assert lines(tmp_path / "few", "train/skips") == [(step, {5: 1, 6: 2, 9: 1}.get(step, 0)) for step in range(1, 13)]
    assert [step for step, loss in lines(tmp_path / "few", "train/loss") if loss is None] == [5, 6, 9]
    assert "step 6: loss nan" in capsys.readouterr().err
    with pytest.raises(TrainError, match=r"step 7: .*3 steps in a row were skipped; the last good checkpoint is of "
                                         r"step 4"):
        train(poison(skipping, 5, 6, 7, 8), tmp_path / "many")


def test_skips_are_counted_over_a_resume(tmp_path):
    config = poison(replace(LINEAR, nonfinite="skip", max_skips=3), 3, 4, 5)
    train(replace(config, steps=4), tmp_path)
    with pytest.raises(TrainError, match=r"step 5: .*3 steps in a row"):
        train(config, tmp_path)


def test_a_run_goes_on_exactly(undisturbed, tmp_path):
    for steps in (3, 8, 12, 12):                                           # the last has nothing left to do
        assert train(replace(LINEAR, steps=steps), tmp_path) == {}
    assert lines(tmp_path, "train/loss") == lines(undisturbed, "train/loss")
    assert_same_bits(restored(tmp_path, 12), restored(undisturbed, 12))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_asked_to_stop_it_saves_and_the_run_goes_on_exactly(number, undisturbed, tmp_path, capsys):
    before = signal.getsignal(number)

    def ask(step, batch):
        if step == 6:
            os.kill(os.getpid(), number)

    assert train(LINEAR, tmp_path, observe=ask) == {}
    assert "stopped after step 6 as asked, everything is saved" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]
    assert signal.getsignal(number) is before
    assert not (tmp_path / "report.html").exists()
    train(LINEAR, tmp_path)
    assert lines(tmp_path, "train/loss") == lines(undisturbed, "train/loss")
    assert_same_bits(restored(tmp_path, 12), restored(undisturbed, 12))


def test_sigterm_at_any_line_of_the_loop_saves_the_last_step(tmp_path, monkeypatch):
    """The signal may come after it was decided whether to save."""
    plain = loop.MetricLog.write

    def write(self, step, metrics):
        plain(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MetricLog, "write", write)
    train(LINEAR, tmp_path)
    rows = [row["step"] for row in lines(tmp_path)]
    assert len(rows) < 12 and Checkpoints(tmp_path / "checkpoints").steps() == [rows[-1]]


def test_two_runs_do_not_share_a_folder(undisturbed):
    other = filelock.FileLock(undisturbed / ".lock")
    with other, pytest.raises(ConfigError, match=f"workdir is '{undisturbed}', which another run is writing to"):
        train(LINEAR, undisturbed)
    with pytest.raises(TrainError) as error:                                # an error, kept, does not hold the folder
        train(poison(LINEAR, 1), undisturbed.parent / "held")
    with pytest.raises(TrainError):
        train(poison(LINEAR, 1), undisturbed.parent / "held")
    assert "step 1" in str(error.value)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir is .*file/run.*cannot be written"):
        train(LINEAR, tmp_path / "file" / "run")


@pytest.mark.parametrize("change, message", [
    ({"seed": 4}, "seed was 3 and is 4"),
    ({"data": replace(LINEAR.data, batch_size=24)}, "data.batch_size was 16 and is 24"),
    ({"data": replace(LINEAR.data, image=replace(LINEAR.data.image, flip=True))},
     "data.image.flip was False and is True"),
    ({"optimizer": replace(LINEAR.optimizer, learning_rate=0.5)}, "optimizer.learning_rate was 0.001 and is 0.5"),
    ({"task": Linear(width=5)}, "task.width was 3 and is 5"),
], ids=lambda value: "" if isinstance(value, dict) else value)
def test_another_configuration_is_refused(undisturbed, change, message):
    untouched = (undisturbed / "config.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train(replace(LINEAR, **change), undisturbed)
    text = str(caught.value)
    assert text.splitlines()[1:] == [f"  {message}"] and str(undisturbed) in text
    assert (undisturbed / "config.json").read_bytes() == untouched


def test_what_is_free_may_change(undisturbed, tmp_path):
    plain = replace(LINEAR, task=Plain())
    train(replace(plain, steps=4), tmp_path)
    notes = json.loads((tmp_path / "config.json").read_text())
    del notes["config"]["data"]["captions"], notes["config"]["max_skips"]      # of a version without these fields
    (tmp_path / "config.json").write_text(json.dumps(notes))
    free = {"microbatches": 2, "log_every": 3, "mesh": MeshConfig(data=2), "nonfinite": "skip", "max_skips": 7,
            "eval_every": 5, "checkpoint": CheckpointConfig(every=5), "steps": 9,
            "data": replace(LINEAR.data, val="digits:test", max_bad=0.5)}
    train(replace(plain, **free), tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 6, 9]
    np.testing.assert_allclose(lines(tmp_path, "train/loss")[-2:],
                               [pair for pair in lines(undisturbed, "train/loss") if pair[0] in (6, 9)], rtol=1e-5)


def test_a_warm_up_of_as_many_steps_is_the_same_configuration(tmp_path):
    """Recipes that gave a number of steps give a share of them today."""
    def warm(warmup, **fields):
        return replace(LINEAR, optimizer=replace(LINEAR.optimizer, warmup=warmup), **fields)

    train(warm(3.0), tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup was 3\.0 and is 0\.4"):
        train(warm(0.4), tmp_path)
    train(warm(0.25), tmp_path)
    train(warm(0.25, steps=14), tmp_path)
    assert lines(tmp_path)[-1]["step"] == 14


def test_a_training_source_that_changed_is_refused(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    for label, number in itertools.product("ab", range(8)):
        (pictures / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number, 0, 0)).save(pictures / label / f"{number}.png")
    config = replace(LINEAR, steps=1, data=DataConfig(train=f"folder:{pictures}", val=None, batch_size=8,
                                                      image=ImageConfig(size=8)))
    train(config, tmp_path / "run")
    (pictures / "a" / "3.png").unlink()
    with pytest.raises(ConfigError, match="lists other records"):
        train(replace(config, steps=2), tmp_path / "run")


def test_a_work_folder_with_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(ConfigError, match=r"config.json is not what a run writes: JSONDecodeError"):
        train(LINEAR, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config.json is not what a run writes: KeyError: 'config'"):
        train(LINEAR, tmp_path)


def test_a_loss_with_extra_state_is_not_computed_in_parts(tmp_path):
    with pytest.raises(ConfigError, match=r"microbatches is 2; expected 1: the loss of Linear"):
        train(replace(LINEAR, microbatches=2), tmp_path)


def test_a_refused_start_leaves_nothing_behind(scenes, tmp_path):
    config = clip_run(scenes, steps=1)
    short = replace(config, data=replace(config.data, tokenizer=TokenizerConfig(vocab_size=150, context_length=9)))
    with pytest.raises(ConfigError, match="context_length is 9"):
        train(short, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] in ([], [".lock"])
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no tokenizer that"):
        train(replace(config, steps=2), tmp_path / "run")


def test_batches_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    config = replace(LINEAR, mesh=MeshConfig(data=2, fsdp=4), microbatches=4)
    with pytest.raises(ConfigError, match=r"data.batch_size is 16; expected a multiple of .* = 8 x 4"):
        train(config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] in ([], [".lock"])


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(replace(LINEAR, steps=4), tmp_path)

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("orbax.checkpoint.AsyncCheckpointer.save", fail)
    with pytest.raises(CheckpointError, match=r"saving .*8 failed: No space left on device; the last whole checkpoint "
                                              r"is of step 4"):
        train(LINEAR, tmp_path)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    train(LINEAR, tmp_path)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 13))


def test_too_many_bad_records_stop_the_run(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures" / "a"
    folder.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02}.png")
    for number in range(4):
        (folder / f"broken{number}.png").write_bytes(b"<html>")
    config = replace(LINEAR, steps=40, data=DataConfig(
        train=f"folder:{folder.parent}", val=None, batch_size=16, image=ImageConfig(size=8), max_bad=0.01))
    with pytest.raises(DataError, match=r"records were bad .*not an image.*data.max_bad allows a share of 0.01"):
        train(config, tmp_path / "run")
    lenient = replace(config, data=replace(config.data, max_bad=0.5))
    train(replace(lenient, steps=10), tmp_path / "counted")
    train(replace(lenient, steps=20), tmp_path / "counted")                # goes on counting
    train(replace(lenient, steps=20), tmp_path / "at once")
    counts = [lines(tmp_path / run, "data/bad_records") for run in ("counted", "at once")]
    assert counts[0] == counts[1] and 0 < counts[0][9][1] < counts[0][19][1]


@pytest.fixture
def cache_dir():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_where_nobody_else_can_write(tmp_path, cache_dir):
    private, shared = tmp_path / "new" / "private", tmp_path / "shared"
    use_compilation_cache(private)
    assert jax.config.jax_compilation_cache_dir == str(private)
    assert private.stat().st_mode & 0o777 == 0o700
    for mode in (0o777, 0o770, 0o1777):
        shared.mkdir(exist_ok=True)
        shared.chmod(mode)
        with pytest.raises(ConfigError, match=f"compilation cache {shared} can be written by others"):
            use_compilation_cache(shared)
    assert jax.config.jax_compilation_cache_dir == str(private)
