"""Plans of small recipes: by libtpu for TPU topologies, and by XLA's CPU compiler for GPUs."""

import contextlib
import importlib.util
import io
import json
from dataclasses import replace

import jax
import pytest

from jaxmm.cli import main
from jaxmm.config import MeshConfig, TrainConfig
from jaxmm.planning import pareto as search
from jaxmm.planning import plan as plans
from jaxmm.planning.chips import CHIPS, Topology, open_topology
from jaxmm.planning.plan import make_plan, requested_bytes, sharding_lines, trace
from jaxmm.planning.shapes import bind
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.validation import ConfigError
from tests.training.common import LINEAR, clip_run, model_task

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                         reason="libtpu is not installed: pip install 'jaxmm[tpu]'")


def recipe(batch_size=16, **fields):
    """Return CLIP on 16 pixels with a vocabulary that the data decides."""
    config = clip_run("nowhere")
    data = replace(config.data, batch_size=batch_size)
    return replace(config, data=data, **{"mesh": MeshConfig(fsdp=2), "steps": 5} | fields)


@pytest.fixture
def plans_folder(user_cache):
    """Where the command keeps plans: what one test compiled the others find there."""
    return user_cache / "jaxmm" / "plans"


@pytest.fixture
def eight():
    """The topology `h100:8` with the tests' eight CPU devices."""
    return Topology("h100:8", "h100", CHIPS["h100"], tuple(jax.devices()))


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:2x2", "v5e:0x4", "v5p:4x4", "v5e:32x32", "h100:0", "tpu:2x2"])
def test_invalid_topologies(name):
    with pytest.raises(ConfigError, match="topology"):
        open_topology(name)


@TPU
def test_a_topology_that_libtpu_does_not_know():
    with pytest.raises(ConfigError, match=r"libtpu does not know: .*divisible"):
        open_topology("v5e:3x5")


@TPU
@pytest.mark.parametrize(("name", "count"), [("v4:2x2x2", 8), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
def test_topologies(name, count):
    topology = open_topology(name)
    assert len(topology.devices) == count and topology.devices[0].platform == "tpu" and not topology.approximate


@TPU
def test_a_plan_for_tpus(plans_folder, monkeypatch):
    topology = open_topology("v5e:2x2")
    made = make_plan(recipe(), topology, plans_folder)
    assert made.fits and made.chips == 4 and made.mesh == {"data": 2, "fsdp": 2, "tensor": 1}
    assert made.peak_bytes == (made.argument_bytes + made.temporary_bytes + made.output_bytes + made.code_bytes
                               - made.aliased_bytes) < made.hbm_bytes == 15.75 * 2**30
    assert made.aliased_bytes > 0.9 * made.output_bytes      # the state is updated in place
    assert made.estimated_step_seconds == made.estimated_cycles / 1.5e9 > 0 and made.kernel_cycles > 0
    assert made.estimated_utilization == made.model_flops / (made.estimated_step_seconds * 197e12 * 4)
    assert {row.kind for row in made.collectives} >= {"all-reduce"}
    assert made.assumed == ("a vocabulary of 150",)

    def refuse(*_):
        raise AssertionError("compiled again")
    monkeypatch.setattr(plans, "compiler_report", refuse)
    assert make_plan(recipe(), topology, plans_folder) == made
    with pytest.raises(AssertionError):
        make_plan(recipe(32), topology, plans_folder)


@TPU
@pytest.mark.long
def test_a_recipe_that_does_not_fit_and_a_change_that_does(tmp_path):
    """Plan for chips with nine tenths of the needed memory: the missing bytes are reported, a change is suggested.

    The batch is large because the activations of a small one fit into on-chip memory, and no change would help.
    """
    large, config = open_topology("v5e:2x2"), recipe(2_048, mesh=MeshConfig(fsdp=4))
    chip = replace(large.chip, hbm_bytes=make_plan(config, large, tmp_path).peak_bytes * 9 // 10)
    topology = replace(large, chip=chip)
    made = make_plan(config, topology, tmp_path)
    assert not made.fits and made.missing_bytes == made.peak_bytes - chip.hbm_bytes > 0
    trials = search.compile_variants(config, search.suggestions(config, 4), topology,
                                     lambda *recipe: make_plan(*recipe, tmp_path))
    [fitting] = search.first_fitting(trials, 1)
    assert fitting.plan.fits and fitting.flags.split()[0] in ("--task.tile", "--task.model.vision.transformer.remat")


def test_suggestions_are_compiled_up_to_the_first_that_fits(eight):
    tried = []

    def plan(config, _):
        if config.mesh.fsdp > recipe().mesh.fsdp:
            raise ConfigError("it cannot run")
        tried.append(planned(1.0, 60, fits=search.remat_of(config) == "full"))
        return tried[-1]

    config = recipe(64)
    trials = search.compile_variants(config, search.suggestions(config, 8), eight, plan)
    [fitting] = search.first_fitting(trials, 1)
    assert fitting.plan is tried[-1] and fitting.plan.fits and not any(plan.fits for plan in tried[:-1])
    assert "remat full" in fitting.flags and len(tried) > 1


def test_the_fitting_ones_are_ordered_by_speed():
    trials = [search.Trial(recipe(), planned(*figures), name) for name, figures in {
        "does not fit": (0.5, 60, False), "slow": (3.0, 40), "fast": (1.0, 45), "unknown": (None, 10),
        "fastest, too late": (0.1, 10)}.items()]
    assert [trial.flags for trial in search.first_fitting(trials)] == ["fast", "slow", "unknown"]


def test_a_plan_for_gpus(eight):
    made = make_plan(recipe(), eight)
    assert made.fits and made.approximate and made.estimated_step_seconds is None
    assert made.peak_bytes > made.argument_bytes > 0 and made.flops > made.model_flops > 0


def test_a_recipe_that_a_run_refuses(eight):
    with pytest.raises(ConfigError, match=r"data\.batch_size is 12; expected a multiple"):
        trace(recipe(12), eight)
    with pytest.raises(ConfigError, match=r"mesh\.fsdp x mesh\.tensor is 3"):
        trace(recipe(mesh=MeshConfig(fsdp=3)), eight)
    with pytest.raises(ConfigError, match=r"microbatches is 2; expected 1"):
        trace(replace(LINEAR, microbatches=2), eight)


def test_shardings_of_every_array(eight):
    lines = {path: (shape, spec, local) for path, shape, spec, local in sharding_lines(trace(recipe(), eight))}
    assert lines["batch/image"] == ("(16, 16, 16, 3)", "(('data', 'fsdp'),)", "(2, 16, 16, 3)")
    assert lines["state/params/vision/encoder/blocks/mlp/up/kernel"] == ("(2, 24, 40)", "(None, 'fsdp')", "(2, 12, 40)")


def test_assumptions():
    assert bind(recipe())[1] == ("a vocabulary of 150",)
    task, assumed = bind(TrainConfig(task=model_task("vit"), steps=1, data=replace(
        recipe().data, image=replace(recipe().data.image, size=12))))
    assert assumed == () and task.model.classes == 10


@pytest.mark.parametrize(("message", "expected"), [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 29.41G of "
     "15.75G hbm. Exceeds hbm capacity by 13.66G.", round(29.41 * 2**30)),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (5.05T) exceeds "
     "available HBM (15.75G).", round(5.05 * 2**40)),
    ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes.", 123456),
    ("INTERNAL: something else", None)])
def test_messages_of_compilers(message, expected):
    assert requested_bytes(message) == expected


def planned(seconds, peak, fits=True, batch=100):
    return plans.Plan(topology="x", chips=1, mesh={}, batch_size=batch, microbatches=1, fits=fits, parameters=1,
                      flops=1.0, model_flops=1.0, hbm_bytes=50, peak_bytes=peak, argument_bytes=1, temporary_bytes=1,
                      output_bytes=1, aliased_bytes=1, code_bytes=1, estimated_step_seconds=seconds)


def test_the_pareto_front():
    trials = [search.Trial(recipe(), planned(*figures), name) for name, figures in {
        "fast": (1.0, 40), "as fast, larger": (1.0, 45), "slow and large": (2.0, 44), "slow and small": (3.0, 10),
        "does not fit": (0.5, 60, False)}.items()]
    assert [trial.flags for trial in search.pareto(trials)] == ["fast", "slow and small"]


def test_suggestions_begin_with_the_cheapest_and_end_with_another_batch(eight):
    config = recipe(64)
    flags = [search.flags(config, change) for change in search.suggestions(config, 8)]
    assert flags[0] == "--mesh.fsdp 4" and "--task.tile 1024" in flags and "--microbatches 2" in flags
    assert "--task.model.vision.transformer.remat full --task.model.text.transformer.remat full" in flags
    assert "--data.batch_size" in flags[-1] and "--data.batch_size" not in flags[0]
    assert len(set(flags)) == len(flags)


def test_suggestions_for_a_task_without_a_stack_of_layers(eight):
    assert search.remat_of(LINEAR) is None
    changes = [search.flags(LINEAR, change) for change in search.suggestions(LINEAR, 8)]
    assert changes and not any("remat" in flags for flags in changes)


def test_candidates(eight):
    config = recipe(64)
    configs = search.candidates(config, eight, fsdp=(1, 8), remats=("none", "full"), microbatches=(1, 2))
    assert len(configs) == 8 and {candidate.mesh.fsdp for candidate in configs} == {1, 8}
    assert {search.remat_of(candidate) for candidate in configs} == {"none", "full"}
    with pytest.raises(ConfigError, match="nothing to try"):
        search.candidates(config, eight, batch_sizes=(7,))
    assert isinstance(search.with_remat(config, "dots").task, ContrastiveLearning)


CONFIG = """
from tests.planning.test_plan import recipe
def get_config():
    return recipe()
"""


@pytest.fixture
def command(user_cache, tmp_path):
    """`jaxmm plan` on the small recipe: its status, what it prints, what it complains of."""
    (tmp_path / "small.py").write_text(CONFIG)

    def run(*args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["plan", "--config", str(tmp_path / "small.py"), *map(str, args)])
        return status, out.getvalue(), err.getvalue()
    return run


@TPU
def test_the_command(command):
    status, text, _ = command("--topology", "v5e:2x2")
    assert status == 0 and "fits" in text and "all-reduce" in text and "a vocabulary of 150" in text
    status, text, _ = command("--topology", "v5e:2x2", "--json")
    report = json.loads(text)
    assert status == 0 and report["fits"] and set(report) >= {
        "hbm_bytes", "peak_bytes", "flops", "estimated_step_seconds", "estimated_utilization", "collectives"}
    status, text, _ = command("--topology", "v5e:2x2", "--search", "--fsdp", 1, "--remats", "none", "--parts", 1)
    assert status == 0 and "the fastest: python run_train.py --config" in text


def test_the_command_says_what_is_wrong(command):
    status, _, err = command("--topology", "v5e:2")
    assert status == 2 and err.startswith("error: topology is 'v5e:2'")
    status, text, _ = command("--topology", "h100:8", "--no-remedies", "--shardings", "--json")
    assert status == 0 and json.loads(text.splitlines()[0])["path"].startswith("state/")
