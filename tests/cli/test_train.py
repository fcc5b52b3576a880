import json
import operator
import shlex
import shutil
from pathlib import Path

import jax
import pytest

import run_train
from jaxmm import cli
from jaxmm.checkpoints import MANIFEST
from jaxmm.cli.train import next_commands, train
from jaxmm.compiling import use_compilation_cache
from jaxmm.planning.shapes import bind
from jaxmm.recipes import load_recipe
from jaxmm.saved_config import save_config, to_dict
from jaxmm.training import loop
from tests.training.common import Plain, lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(user_cache, tmp_path, capsys, monkeypatch):
    """Runs the command line in an empty folder; its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*args, config="vit_digits.py"):
        try:
            args = [str(arg) for arg in args]
            if "--config" not in args:
                args = ["--config", str(ROOT / "configs" / config), *args]
            status = run_train.main(args)
        except SystemExit as stop:                                         # how tyro refuses
            status = stop.code
        return status, capsys.readouterr().err

    return command


@pytest.fixture
def recipe(tmp_path):
    """A configuration file that trains in a second."""
    path = tmp_path / "linear.py"
    path.write_text("from dataclasses import replace\n"
                    "from tests.training.common import LINEAR, Plain\n\n"
                    "def get_config():\n    return replace(LINEAR, task=Plain())\n")
    return path


def test_the_command_line_trains_and_goes_on(command, recipe, tmp_path):
    common = "--config", recipe, "--workdir", "run", "--mesh.data", 1
    assert command(*common, "--steps", 3, "--checkpoint.every", 2)[0] == 0
    status, text = command(*common, "--steps", 5, "--log-every", 2, "--microbatches", 2)
    assert status == 0 and "going on after step 3" in text
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["steps"], config["log_every"], config["microbatches"]) == (5, 2, 2)


def test_the_documented_names_are_options(recipe):
    given = {"seed": 5, "steps": 9, "microbatches": 3, "log-every": 4, "data.train": "digits:test", "data.val": "x:y",
             "data.batch-size": 12, "data.workers": 1, "optimizer.learning-rate": 0.25, "mesh.data": 1,
             "mesh.fsdp": 2, "mesh.tensor": 4, "checkpoint.every": 11}
    args = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    options, config = train.parse(["--config", str(recipe), "--workdir", "w", *args])
    assert options.config == recipe and options.workdir == Path("w")
    for name, value in given.items():
        found = config
        for part in name.replace("-", "_").split("."):
            found = getattr(found, part)
        assert found == value, name
    assert config.task == Plain() and config.optimizer.schedule == "constant"


@pytest.mark.parametrize("name, field, value", [
    ("attention_conv_digits", "scores", "learned_content"), ("vit_cifar10_patch2", "transformer.mlp_dim", 640)])
def test_the_fields_of_either_kind_of_classifier_are_options(name, field, value):
    """The recipe says which kind."""
    given = ["--config", name, f"--task.model.{field.replace('_', '-')}", str(value)]
    assert operator.attrgetter(f"task.model.{field}")(train.parse(given)[1]) == value


def test_a_recipe_may_define_its_own_task(command, recipe, tmp_path):
    recipe.write_text("""
from __future__ import annotations
from dataclasses import dataclass, replace
from tests.training.common import LINEAR, Linear

@dataclass(frozen=True, kw_only=True)
class Own(Linear):
    scale: float = 1.0

def get_config():
    return replace(LINEAR, task=Own(), steps=1)
""")
    status, text = command("--config", recipe, "--workdir", "run", "--mesh.data", 1, "--task.scale", 2.5)
    assert status == 0, text
    task = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["task"]
    assert task["scale"] == 2.5 and task["type"].endswith(".Own")


def test_without_a_work_folder_a_new_one_is_named_after_the_recipe(command, recipe, tmp_path):
    assert command("--config", recipe, "--steps", 1, "--mesh.data", 1)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("linear-") and (folder / "report.html").exists()


@pytest.mark.parametrize("config, commands", [
    ("blip_scenes", ["caption IMAGES", "match IMAGE"]), ("blip_captions", ["caption IMAGES"]),
    ("blip_vqa", ["answer IMAGE"]), ("blip_coco_retrieval", ["match IMAGE"]),
    ("clip_scenes", ["search index FOLDER INDEX", "classify IMAGES --labels"]),
    ("vit_digits", ["classify IMAGES --model"]), ("blip_nlvr2", [])])
def test_what_a_trained_model_can_do_is_said(config, commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxmm.cli.image_files.use_compilation_cache", lambda: None)
    task = bind(load_recipe(config))[0]
    *found, python, _, page = [*(line for _, line in next_commands(task, tmp_path)), *([] if commands else [""])]
    assert page == (f"jaxmm serve {tmp_path}" if commands else "")
    assert len(found) == len(commands) and f'jaxmm.load("{tmp_path}")' in python
    for line, command in zip(found, commands, strict=True):
        assert line.startswith(f"jaxmm {command}") and line.endswith(f"--model {tmp_path}")
        assert cli.main(shlex.split(line)[1:]) in (1, 2)       # understood: it is the image that is not there
        assert capsys.readouterr().err.startswith("error: ")


def test_what_to_do_next_is_said_of_the_bound_task(recipe, tmp_path, monkeypatch, capsys):
    """A recipe for any data set has no classes of its own."""
    def trained(config, workdir):
        workdir.mkdir()
        save_config(config, workdir / "config.json", task=to_dict(bind(config)[0]))
        return {"val/top1": 1.0}

    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr("jaxmm.cli.train.use_compilation_cache", lambda folder: None)
    assert run_train.main(["--config", "vit_digits", "--workdir", str(tmp_path / "run")]) == 0
    assert f"jaxmm classify IMAGES --model {tmp_path}/run" in capsys.readouterr().out


@pytest.mark.parametrize("args, words", [
    (("--data.batchsize", "8"), ["--data.batchsize", "--data.batch-size"]),
    (("--optimizer.learning_rat", "1"), ["learning", "--optimizer.learning-rate"]),
    (("--steps", "many"), ["--steps", "many", "int"]),
    (("--optimizer.learning-rate", "fast"), ["--optimizer.learning-rate", "fast"]),
    (("--nonfinite", "ignore"), ["--nonfinite", "ignore", "skip"]),
    (("--steps", "0"), ["steps is 0", "a positive number"]),
    (("--microbatches", "3"), ["microbatches is 3", "divisor", "128"]),
    (("--data.batch-size", "0"), ["data.batch_size is 0"]),
    (("--data.image.scale", "0.5", "2.0"), ["data.image.scale is (0.5, 2.0)"]),
    (("--task.model.patch", "3"), ["image_size is 8", "multiple of patch = 3"]),
    (("--task.model.transformer.heads", "5"), ["heads is 5", "divisor of width = 64"]),
    (("--data.image.size", "16"), ["data.image.size is 16", "task.model.image_size = 8"]),
    (("--mesh.data", "3"), ["data.batch_size is 128", "multiple", "3"]),
    (("--mesh.data", "16"), ["mesh.data", "16 devices", "has 8"]),
    (("--mesh.fsdp", "3"), ["mesh.fsdp", "divisor of the 8 devices"]),
    (("--mesh.tensor", "0"), ["mesh.tensor is 0"]),
    (("--optimizer.freeze", "encoder/block/"), ["optimizer.freeze", "encoder/block/", "matches none"]),
    (("--optimizer.decay", "("), ["optimizer.decay", "regular expression"]),
    (("--steps", "800", "--optimizer.warmup", "900"), ["warmup", "900", "steps = 800"]),
    (("--data.train", "didgits:train"), ["didgits", "did you mean 'digits'"]),
    (("--data.train", "digits:trian"), ["digits:trian", "train or test"]),
    (("--data.train", "digits"), ["digits:SPLIT"]),
    (("--data.train", "folder:/no/such/folder"), ["no folder '/no/such/folder'"]),
    (("--data.train", "captions:/no/such.jsonl"), ["cannot read /no/such.jsonl"]),
    (("--data.val", "coco:/no/such.json"), ["cannot read /no/such.json"]),
    (("--data.train", "scenes:tiny/trian"), ["tiny/trian", "train"]),
    (("--data.train", "tfds:no_such_set:train"), ["no_such_set"]),
    (("--config", "nowhere.py"), ["nowhere.py", "no file", "vit_digits.py"]),
    (("--config", __file__), ["test_train.py", "has no get_config"]),
    (("--config",), ["--config"]),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_what_cannot_be_is_refused_in_one_message(command, tmp_path, args, words):
    status, text = command("--workdir", tmp_path / "run", *args)
    assert status not in (0, None) and "Traceback" not in text
    for word in words:
        assert word in " ".join(text.split()), text
    assert len(text.splitlines()) == 1 if text.startswith("error: ") else "--help" in text, text   # tyro's is a box
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "runs").exists()


def picture_folder(folder, content):
    (folder / "a").mkdir(parents=True)
    for number in range(60 if content is not None else 0):
        (folder / "a" / f"{number}.png").write_bytes(content)
    return f"folder:{folder}"


def test_a_source_without_pictures(command, tmp_path):
    status, text = command("--data.train", picture_folder(tmp_path / "pictures", None), "--mesh.data", 1)
    assert status == 1 and "is empty" in text and len(text.splitlines()) == 1


def test_an_empty_list_of_captions(command, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    status, text = command("--data.train", f"captions:{tmp_path}/none.jsonl", "--data.val", "None",
                           config="clip_captions.py")
    assert status == 1 and "is empty" in text and len(text.splitlines()) == 1


def test_a_source_whose_every_picture_is_broken(command, tmp_path):
    status, text = command("--data.train", picture_folder(tmp_path / "pictures", b"<html>"), "--data.val", "None",
                           "--steps", 2, "--workdir", "run")
    assert status == 1 and "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "50 records in a row cannot be used" in line and "not an image" in line


def test_a_source_that_lacks_what_the_task_needs(command, tmp_path):
    status, text = command("--data.train", "digits:train", "--data.val", "None", config="clip_captions.py")
    assert status == 2 and "has no texts" in text and len(text.splitlines()) == 1


def test_unreadable_checkpoints_end_the_run_every_time(command, recipe, tmp_path):
    common = "--config", recipe, "--workdir", tmp_path / "run", "--mesh.data", 1
    assert command(*common, "--steps", 8)[0] == 0
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "run" / "checkpoints").glob(f"*/{MANIFEST}"):
        path.write_bytes(path.read_bytes()[:40])
    for _ in range(2):
        status, text = command(*common)
        assert status == 1 and f"every checkpoint in {tmp_path}/run/checkpoints is damaged: 4, 8" in text
        assert text.splitlines()[-1].startswith("error: ") and "Traceback" not in text
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole


def test_a_full_disk(command, recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    status, text = command("--config", recipe, "--workdir", tmp_path / "run", "--mesh.data", 1)
    assert status == 1 and "MiB are free; there is no whole checkpoint yet" in text.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_another_configuration_in_a_used_folder(command, recipe, tmp_path):
    common = "--config", recipe, "--workdir", tmp_path / "run", "--mesh.data", 1, "--steps", 1
    assert command(*common)[0] == 0
    status, text = command(*common, "--seed", 8)
    assert status == 2 and "seed was 3 and is 8" in text and "Traceback" not in text


def test_a_cache_that_others_can_write(command, recipe, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    status, text = command("--config", recipe, "--cache", tmp_path / "cache")
    assert status == 2 and "can be written by others" in text and len(text.splitlines()) == 1


def test_a_cache_that_cannot_be(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    with caplog.at_level("WARNING"):
        use_compilation_cache(tmp_path / "file" / "cache")
    assert "compiled programs are not kept" in caplog.text and "file/cache" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_hosts_need_one_folder_and_a_cluster(command, recipe, tmp_path):
    there = "--hosts.address", "localhost:1", "--hosts.count", 2, "--hosts.index"
    status, text = command("--config", recipe, *there, 1)
    assert status == 2 and "workdir is None; expected one folder for all 2 hosts" in text
    status, text = command("--config", recipe, *there, 2)
    assert status == 2 and "hosts.index is 2; expected the number of this process, 0 to 1" in " ".join(text.split())
    status, text = command("--config", recipe, "--hosts.count", 2, "--workdir", tmp_path / "run")
    assert status == 2 and "hosts.count is 2; expected 1, which JAX found here" in text and len(text.splitlines()) == 1


def test_a_disk_that_fills_up_is_one_message(command, recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.MetricLog, "write", fail)
    status, text = command("--config", recipe, "--workdir", tmp_path / "run", "--mesh.data", 1)
    assert status == 1 and "No space left on device" in text and "Traceback" not in text


HUNGRY = """
from dataclasses import dataclass, replace
import jax.numpy as jnp
from jax import lax
from tests.training.common import LINEAR, Plain

@dataclass(frozen=True, kw_only=True)
class Hungry(Plain):
    def objective(self, params, outputs, batch):
        loss, metrics = super().objective(params, outputs, batch)
        many = jnp.arange(2**22, dtype=jnp.float32) * lax.stop_gradient(loss)
        return loss + jnp.sort(many[:, None] - many[None], axis=1)[3, 5], metrics

def get_config():
    return replace(LINEAR, task=Hungry())
"""


def test_too_little_memory_ends_with_changes_that_need_less(command, recipe):
    """A step that sorts 64 TiB."""
    recipe.write_text(HUNGRY)
    status, text = command("--config", recipe, "--workdir", "run", "--mesh.data", 1)
    _, error, advice, first, *_, last = text.splitlines()
    assert status == 1 and error.startswith("error: the run does not fit into memory: RESOURCE_EXHAUSTED: Out of mem")
    assert advice == "these need less memory, from the cheapest:" and first.endswith(" --mesh.fsdp 4")
    assert "\n  --microbatches 2\n" in text and last.startswith(f"jaxmm plan --config {recipe} --topology ")
