import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jaxmm.capfilt import bootstrap as module
from jaxmm.capfilt.bootstrap import CapFiltConfig, bootstrap
from jaxmm.cli import main
from jaxmm.config import MeshConfig
from jaxmm.data.sources.registry import open_source
from jaxmm.recipes import load_recipe
from jaxmm.validation import ConfigError
from tests.capfilt.conftest import SAMPLED
from tests.pretrained import tiny

RECIPE = Path(__file__).parents[2] / "configs" / "capfilt_scenes.py"


def small(run, steps, data_dir):
    evals = tuple(replace(each, pool=None) if hasattr(each, "pool") else each for each in run.evals[:1])
    data = replace(run.data, data_dir=data_dir, val="scenes:tiny/test", batch_size=8,
                   image=replace(run.data.image, size=32))
    return replace(run, steps=steps, mesh=MeshConfig(data=1), optimizer=replace(run.optimizer, warmup=0), evals=evals,
                   checkpoint=replace(run.checkpoint, every=100), data=data)


@pytest.fixture(scope="module")
def recipe(scenes):
    """The recipe itself, with small towers and little data."""
    data_dir = str(scenes)
    whole = load_recipe(RECIPE)

    def smaller(run):
        model = run.task.model
        vision = replace(model.vision, image_size=32, patch=8,
                         transformer=replace(model.vision.transformer, width=32, depth=1, mlp_dim=40))
        text = replace(model.text, context_width=32,
                       transformer=replace(model.text.transformer, width=32, depth=1, mlp_dim=40))
        return small(replace(run, task=replace(run.task, model=replace(model, vision=vision, text=text))), 3, data_dir)

    return replace(whole, web="scenes:tiny/web", human="scenes:tiny/train[:16]", human_weight=2,
                   shard_records=30,
                   rule=replace(whole.rule, threshold=None, quantile=0.3),
                   **{name: smaller(getattr(whole, name)) for name in ("pretrain", "captioner", "filter")})


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stand-in for training that saves tiny models; a list of (folder, start of its weights, source trained on)."""
    runs = []

    def train(config, workdir):
        runs.append((str(workdir.relative_to(tmp_path)), config.init.source, config.data.train))
        {"captioner": tiny.captioner, "filter": tiny.matcher}.get(workdir.name, tiny.matcher)().save(workdir)
        return {"val": len(runs)}

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "whole_steps", lambda checkpoints: [3])
    return runs


def test_each_run_starts_from_the_model_and_the_data_before_it(recipe, tmp_path, trained):
    said: list[str] = []
    recipe = replace(recipe, rounds=2, decoding=SAMPLED, captions=2)
    metrics = bootstrap(recipe, tmp_path, say=said.append)
    first, both = tmp_path / "pretrain", f"{recipe.web} + 2*{recipe.human}"
    new = [f"tfds:{tmp_path}/round-{i}/data/merged:web + 2*tfds:{tmp_path}/round-{i}/data/merged:human" for i in (1, 2)]
    assert trained == [
        ("pretrain", None, both),
        ("round-1/captioner", str(first), recipe.human), ("round-1/filter", str(first), recipe.human),
        ("round-1/model", None, new[0]),
        ("round-2/captioner", f"{tmp_path}/round-1/model", recipe.human),
        ("round-2/filter", f"{tmp_path}/round-1/model", recipe.human), ("round-2/model", None, new[1])]
    assert metrics == {name: {"val": i + 1} for i, (name, *_) in enumerate(trained)} and len(said) == 9
    for i in (1, 2):
        data = tmp_path / f"round-{i}" / "data"
        assert 0 < len(open_source(f"tfds:{data}/merged:web")) <= 80 and (data / "report.html").exists()
        assert len(open_source(f"tfds:{data}/merged:human")) == 16
    assert bootstrap(recipe, tmp_path) == metrics and len(trained) == 7
    with pytest.raises(ConfigError, match=r"holds a run of something else.*\n  rule.quantile was 0.3 and is 0.4"):
        bootstrap(replace(recipe, rule=replace(recipe.rule, quantile=0.4)), tmp_path)


@pytest.mark.long
def test_two_rounds_and_what_is_done_is_not_done_again(recipe, tmp_path, monkeypatch):
    """The second round with the models of the first, so that no more is trained than says something."""
    said: list[str] = []
    metrics = bootstrap(recipe, tmp_path, say=said.append)
    assert list(metrics) == ["pretrain", "round-1/captioner", "round-1/filter", "round-1/model"]
    assert all(each for each in metrics.values())
    web = open_source(f"tfds:{tmp_path}/round-1/data/merged:web")
    assert 0 < len(web) <= 80 and len(open_source(f"tfds:{tmp_path}/round-1/data/merged:human")) == 16
    assert (tmp_path / "round-1" / "data" / "report.html").exists() and len(said) == 5
    trained = []

    def copied(config, workdir):
        trained.append((workdir.name, config.init.source, config.data.train))
        shutil.copytree(tmp_path / "round-1" / workdir.name, workdir)
        return {"val": 1.0}

    monkeypatch.setattr(module, "train", copied)
    assert bootstrap(recipe, tmp_path) == metrics and not trained
    again = bootstrap(replace(recipe, rounds=2), tmp_path)
    assert list(again)[:4] == list(metrics) and len(again) == 7
    last, data = f"{tmp_path}/round-1/model", f"{tmp_path}/round-2/data/merged"
    assert trained == [("captioner", last, recipe.human), ("filter", last, recipe.human),
                       ("model", None, f"tfds:{data}:web + 2*tfds:{data}:human")]
    with pytest.raises(ConfigError, match=r"holds a run of something else.*\n  rule.quantile was 0.3 and is 0.4"):
        bootstrap(replace(recipe, rule=replace(recipe.rule, quantile=0.4)), tmp_path)


def test_a_run_that_is_asked_to_stop_stops_all(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda config, workdir: {})
    assert bootstrap(recipe, tmp_path) == {} and not (tmp_path / "bootstrap.json").exists()


def test_what_cannot_be(tmp_path):
    whole = load_recipe(RECIPE)
    slow = replace(whole.filter, steps=40, optimizer=replace(whole.filter.optimizer, warmup=50))
    with pytest.raises(ConfigError, match=r"warmup \+ optimizer\.cooldown is 50; expected at most steps = 40"):
        bootstrap(replace(whole, filter=slow), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="rounds is 0; expected a positive number"):
        replace(whole, rounds=0)
    assert isinstance(whole, CapFiltConfig)


def test_any_field_can_be_set_on_the_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "bootstrap", lambda recipe, out: seen.append((recipe, out)) or {})
    assert main(["capfilt", "bootstrap", "--config", str(RECIPE), "--out", str(tmp_path), "--pretrain.steps", "7",
                 "--rule.threshold", "0.7", "--rounds", "2"]) == 0
    [(recipe, out)] = seen
    assert (recipe.pretrain.steps, recipe.rule.threshold, recipe.rounds, out) == (7, 0.7, 2, tmp_path)
    assert recipe.captioner == load_recipe(RECIPE).captioner


def test_a_recipe_of_one_run_is_no_bootstrap(tmp_path, capsys):
    config = RECIPE.with_name("vit_digits.py")
    assert main(["capfilt", "bootstrap", "--config", str(config), "--out", str(tmp_path)]) == 2
    assert "a recipe whose get_config() gives a CapFiltConfig" in capsys.readouterr().err
