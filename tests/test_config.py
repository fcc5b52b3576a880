import copy
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxmm.capfilt.bootstrap import CapFiltConfig
from jaxmm.config import (
    CheckpointConfig,
    DataConfig,
    Evaluator,
    ImageConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxmm.models.vit import vit
from jaxmm.saved_config import (
    RENAMED,
    from_dict,
    save_config,
    to_dict,
    with_current_names,
    with_first_names,
    with_new_fields,
)
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.optimizer import learning_rate
from jaxmm.validation import ConfigError, check_types, count_steps
from tests.properties import EXAMPLES, NUMBERS, SCALARS

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"), key=lambda path: path.stem)
TASK = Classification(model=vit("mu/4", image_size=8))


def recipe(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_the_promised_recipes_are_there():
    assert {path.stem for path in RECIPES} >= {
        "clip_scenes", "vit_digits", "vit_folder", "clip_captions", "vit_s16_imagenet", "vit_b16_imagenet", "clip_b32",
        "clip_l14", "siglip_b16", "lit_b16", "blip_scenes", "blip_captions", "blip_vqa", "blip_b16_pretrain",
        "blip_l16_pretrain", "blip_coco_caption", "blip_coco_retrieval", "blip_flickr_retrieval", "blip_vqav2",
        "blip_nlvr2", "capfilt_scenes", "attention_conv_digits", "attention_conv_cifar10", "vit_cifar10_patch2"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_survive_json(path, tmp_path):
    config = recipe(path)
    assert isinstance(config, CapFiltConfig if path.stem.startswith("capfilt") else TrainConfig)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    if isinstance(config, CapFiltConfig):
        return
    save_config(config, tmp_path / "config.json", versions={"jax": "1"})
    written = json.loads((tmp_path / "config.json").read_text())
    saved = from_dict(written["config"])
    assert saved == config and hash(saved) == hash(config), "tuples stay tuples"
    assert written["versions"] == {"jax": "1"} and written["config"]["type"] == "jaxmm.config.TrainConfig"


@pytest.mark.parametrize("name, expected", [
    ("blip_scenes", [(1000, 100, 300)]), ("blip_captions", [(11_000, 0, None)]), ("blip_vqa", [(1600, 100, None)]),
    ("clip_scenes", [(420, 50, None)]), ("clip_captions", [(1500, 100, None)]), ("vit_digits", [(2000, 200, None)]),
    ("vit_folder", [(4800, 480, None)]), ("finetune_captions", [(1000, 100, None)]),
    ("finetune_folder", [(1000, 100, None)]), ("attention_conv_digits", [(2000, 100, None)]),
    ("capfilt_scenes", [(600, 50, 300), (1000, 50, None), (300, 50, 0)])])
def test_an_embedded_recipe_can_be_shortened(name, expected):
    """Warm-up and ramp are shares of the run; in the full run they are these numbers of steps."""
    config = recipe(Path(__file__).parents[1] / "configs" / f"{name}.py")
    runs = [config] if isinstance(config, TrainConfig) else [config.pretrain, config.captioner, config.filter]
    counts = [(run.steps, count_steps(run.optimizer.warmup, run.steps),
               getattr(run.task.with_steps(run.steps), "ramp", None)) for run in runs]
    assert counts == expected
    for run, (steps, warmup, ramp) in zip(runs, expected, strict=True):
        short = dataclasses.replace(run, steps=20)
        learning_rate(short.optimizer, short.steps)                     # accepts it
        assert count_steps(short.optimizer.warmup, 20) == round(20 * warmup / steps)
        if ramp is not None:
            assert short.task.with_steps(20).ramp == round(20 * ramp / steps)


def test_plain_values():
    assert to_dict(((1, None), "a", {"b": 2}["b"])) == [[1, None], "a", 2]
    assert from_dict([[1, None], "a"]) == ((1, None), "a")
    assert to_dict(MeshConfig(fsdp=2)) == {"type": "jaxmm.config.MeshConfig", "data": -1, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("value", [
    {"type": "subprocess.Popen", "args": ["true"]},
    {"type": "jaxmm.config.importlib"},
    {"type": "jaxmm.config.require"},
    {"type": "jaxmm.config.ConfigError"},
    {"type": "jaxmm.config.Missing"},
    {"type": "jaxmm.nothing.Config"},
    {"type": "jaxmm.models.clip.ViTConfig"},
    {"type": 3},
    {"type": "MeshConfig"},
    {"data": 1},
])
def test_refuses_other_types(value):
    with pytest.raises(ConfigError, match=r"type is .*; expected a frozen dataclass at the top level"):
        from_dict({"type": "jaxmm.config.TrainConfig", "task": value})


@pytest.mark.parametrize("module", ["jaxmmx.config", "no.such_module", "MeshConfig.<locals>"])
def test_imports_nothing_because_a_file_says_so(module):
    with pytest.raises(ConfigError, match=rf"^run/config\.json: type is .* is not imported; import {module} first"):
        from_dict({"type": f"{module}.MeshConfig"}, "run/config.json")
    assert module not in sys.modules


def test_fields_that_older_versions_did_not_have_are_the_defaults():
    new = json.loads(json.dumps(to_dict([DataConfig(captions=3), TokenizerConfig(vocab_size=99)])))
    old = json.loads(json.dumps(new))
    for name in ("captions", "origins", "image"):
        del old[0][name]
    del old[1]["answer_length"]
    new[0]["captions"] = 1
    assert with_new_fields(old) == new
    for other in ({"type": "elsewhere.Thing"}, {"a": [1, {"b": None}]}, "x"):
        assert with_new_fields(other) == other


def test_refuses_unknown_fields():
    with pytest.raises(ConfigError, match=r"jaxmm.config.MeshConfig has no field \['datas'\]"):
        from_dict({"type": "jaxmm.config.MeshConfig", "datas": 1})


def test_reading_checks_values_again():
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is 0"):
        from_dict(to_dict(MeshConfig()) | {"fsdp": 0})


@pytest.mark.parametrize("build, message", [
    (lambda: ImageConfig(size=0), "data.image.size is 0; expected a positive number"),
    (lambda: ImageConfig(scale=(0.5, 0.2)), "data.image.scale is (0.5, 0.2); expected 0 < from <= to <= 1"),
    (lambda: ImageConfig(scale=(0.5, 1.2)), "data.image.scale is (0.5, 1.2)"),
    (lambda: ImageConfig(ratio=(0, 1)), "data.image.ratio is (0, 1)"),
    (lambda: ImageConfig(randaugment_layers=-1), "data.image.randaugment_layers is -1"),
    (lambda: ImageConfig(randaugment_magnitude=31), "data.image.randaugment_magnitude is 31; expected 0 to 30"),
    (lambda: ImageConfig(eval_resize=0.9), "data.image.eval_resize is 0.9; expected 1 or more"),
    (lambda: TokenizerConfig(context_length=2), "data.tokenizer.context_length is 2; expected 3 or more"),
    (lambda: TokenizerConfig(vocab_size=15), "data.tokenizer.vocab_size is 15"),
    (lambda: TokenizerConfig(kind="clip"), "data.tokenizer.file is None; expected a path, for kind 'clip'"),
    (lambda: DataConfig(questions=0), "data.questions is 0; expected a positive number"),
    (lambda: DataConfig(captions=0), "data.captions is 0; expected a positive number"),
    (lambda: DataConfig(origins=(("web", 0.0),)), "data.origins is (('web', 0.0),); expected different origins"),
    (lambda: DataConfig(origins=(("web", 1.0), ("web", 2.0))), "data.origins is"),
    (lambda: DataConfig(origins=(("web", -1.0), ("human", 2.0))), "weights of 0 or more, one above 0"),
    (lambda: DataConfig(batch_size=0), "data.batch_size is 0; expected a positive number"),
    (lambda: DataConfig(workers=-1), "data.workers is -1"),
    (lambda: DataConfig(max_bad=1.5), "data.max_bad is 1.5; expected a share from 0 to 1"),
    (lambda: OptimizerConfig(learning_rate=-1), "optimizer.learning_rate is -1; expected 0 or more"),
    (lambda: OptimizerConfig(warmup=-1), "optimizer.warmup is -1"),
    (lambda: OptimizerConfig(cooldown=-1), "optimizer.cooldown is -1"),
    (lambda: OptimizerConfig(weight_decay=-1), "optimizer.weight_decay is -1"),
    (lambda: OptimizerConfig(clip=0), "optimizer.clip is 0; expected a positive number, or None"),
    (lambda: OptimizerConfig(layer_decay=1.5), "optimizer.layer_decay is 1.5; expected above 0, at most 1, or None"),
    (lambda: OptimizerConfig(average=0), "optimizer.average is 0"),
    (lambda: OptimizerConfig(b2=1), "optimizer.b2 is 1; expected 0 or more, below 1"),
    (lambda: OptimizerConfig(momentum=-0.1), "optimizer.momentum is -0.1"),
    (lambda: OptimizerConfig(freeze=("[",)), "optimizer.freeze holds '['; expected a regular expression"),
    (lambda: OptimizerConfig(decay="("), "optimizer.decay holds '('"),
    (lambda: OptimizerConfig(multipliers=(("*", 1.0),)), "optimizer.multipliers holds '*'"),
    (lambda: MeshConfig(data=0), "mesh.data is 0; expected a positive number, or -1 for the rest"),
    (lambda: MeshConfig(tensor=-1), "mesh.tensor is -1"),
    (lambda: CheckpointConfig(every=0), "checkpoint.every is 0; expected a positive number"),
    (lambda: CheckpointConfig(keep=0), "checkpoint.keep is 0"),
    (lambda: Evaluator(batch_size=0), "evals.batch_size is 0"),
    (lambda: TrainConfig(task=TASK, steps=0), "steps is 0; expected a positive number"),
    (lambda: TrainConfig(task=TASK, log_every=0), "log_every is 0"),
    (lambda: TrainConfig(task=TASK, max_skips=0), "max_skips is 0"),
    (lambda: TrainConfig(task=TASK, eval_every=0), "eval_every is 0; expected a positive number, or None"),
    (lambda: TrainConfig(task=TASK, microbatches=3), "microbatches is 3; expected a divisor of data.batch_size = 64"),
])
def test_refuses_values(build, message):
    """The message names the field as the command line does, the value, and what is wanted."""
    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)


@pytest.mark.parametrize("config, field, value, message", [
    (ImageConfig(), "train_crop", "centre", "train_crop is 'centre'; expected one of 'random', 'pad', 'center'"),
    (ImageConfig(), "scale", (0.1, 0.5, 1.0), "scale is (0.1, 0.5, 1.0); expected tuple[float, float]"),
    (OptimizerConfig(), "name", "adam", "name is 'adam'; expected one of 'adamw', 'adafactor', 'lion', 'muon', 'sgd'"),
    (OptimizerConfig(), "average", "yes", "average is 'yes'; expected float | None"),
    (OptimizerConfig(), "multipliers", (("a", "b"),), "multipliers is (('a', 'b'),)"),
    (OptimizerConfig(), "freeze", ["a"], "freeze is ['a']"),
    (TASK.model, "pool", "avg", "pool is 'avg'; expected one of 'cls', 'gap', 'map'"),
    (TASK.model.transformer, "init", "trunc", "init is 'trunc'; expected one of 'xavier', 'clip', 'torch', 'normal'"),
    (TrainConfig(task=TASK), "nonfinite", "raise", "nonfinite is 'raise'; expected one of 'stop', 'skip'"),
    (TrainConfig(task=TASK), "steps", 10.5, "steps is 10.5; expected int"),
    (TrainConfig(task=TASK), "steps", True, "steps is True; expected int"),
    (TrainConfig(task=TASK), "data", None, "data is None; expected DataConfig"),
])
def test_types_are_checked_in_recipes_too(config, field, value, message):
    check_types(config)
    config = copy.copy(config)
    object.__setattr__(config, field, value)                    # as if written so in a recipe: the tests' hook refuses
    with pytest.raises(ConfigError) as error:
        config.__post_init__()                                  # is where recipes meet the check
    assert message in str(error.value)


def test_every_field_is_frozen_and_by_name_only():
    for cls in (TrainConfig, DataConfig, ImageConfig, TokenizerConfig, OptimizerConfig, MeshConfig, CheckpointConfig):
        assert cls.__dataclass_params__.frozen and all(f.kw_only for f in dataclasses.fields(cls)), cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshConfig().data = 3
    assert issubclass(ConfigError, ValueError)


def test_old_and_new_names_of_types_are_one_to_one():
    old = [{"type": name, "inner": [{"type": "own.Task"}]} for name in RENAMED]
    new = with_current_names(old)
    assert [value["type"] for value in new] == list(RENAMED.values())
    assert with_first_names(new) == old and with_current_names(new) == new


CONFIGS = (ImageConfig(), TokenizerConfig(), DataConfig(), InitConfig(), OptimizerConfig(), MeshConfig(),
           CheckpointConfig(), Evaluator(), TrainConfig(task=TASK), TASK, TASK.model, TASK.model.transformer)
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
LITERALS = st.sampled_from(["adamw", "cosine", "center", "bicubic", "clip", "params", "skip", "gap",
                            "a{9999999999999}"])
PARTS = SCALARS | LITERALS


@EXAMPLES
@given(st.sampled_from(FIELDS), PARTS | st.lists(PARTS | st.tuples(PARTS, NUMBERS), max_size=3).map(tuple))
@example((OptimizerConfig(), "decay"), "a{9999999999999}")
@example((OptimizerConfig(), "final"), math.nan)
@example((ImageConfig(), "ratio"), (0.5, math.inf))
@example((TrainConfig(task=TASK), "seed"), -1)
def test_any_value_is_refused_or_survives_json(place, value):
    """The message says which value; nothing that is accepted is changed by being saved."""
    config, name = place
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    try:
        changed.__post_init__()
    except ConfigError as error:
        assert " is " in str(error) or " holds " in str(error)
        return
    assert from_dict(json.loads(json.dumps(to_dict(changed), allow_nan=False))) == changed


@pytest.mark.parametrize("config, field, value, message", [
    (OptimizerConfig(), "final", math.nan, "optimizer.final is nan; expected finite numbers"),
    (OptimizerConfig(), "learning_rate", math.inf, "optimizer.learning_rate is inf; expected finite numbers"),
    (ImageConfig(), "ratio", (0.5, math.inf), "data.image.ratio is (0.5, inf); expected finite numbers"),
    (TrainConfig(task=TASK), "seed", -1, "seed is -1; expected 0 to 2^32 - 1"),
    (TrainConfig(task=TASK), "seed", 2**32, "seed is 4294967296; expected 0 to 2^32 - 1"),
    (OptimizerConfig(), "decay", "a{9999999999999}", "optimizer.decay holds 'a{9999999999999}'; expected a regular")])
def test_numbers_that_no_run_can_use(config, field, value, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(config, **{field: value})
    assert message in str(error.value)
