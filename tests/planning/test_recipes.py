"""Every recipe of published size: the sharding of its arrays on three meshes, and that it fits its topology.

`python -m tests.planning.test_recipes` rewrites the golden listings.
"""

import importlib.metadata
import importlib.util
import math
import re
from functools import cache
from pathlib import Path

import jax
import pytest

from benchmarks.pod_plans import CONFIGS, TARGETS
from jaxmm.planning.chips import open_topology
from jaxmm.planning.plan import make_plan
from jaxmm.planning.shapes import bind
from jaxmm.recipes import load_recipe
from jaxmm.sharding import named_leaves, spec
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import abstract_state

GOLDEN = Path(__file__).parents[1] / "golden" / "shardings"
NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@cache
def state(name):
    config = load_recipe(CONFIGS / f"{name}.py")
    task = bind(config)[0]
    params = jax.eval_shape(task.init, jax.random.key(0))
    return config, abstract_state(task, make_optimizer(config.optimizer, params, config.steps, task.clamps))


def meshes(name):
    """Return the recipe's own mesh, one with 16 FSDP shards, and one with 4 and tensor parallelism over 4."""
    config, _ = state(name)
    chips = math.prod(int(size) for size in TARGETS[name].partition(":")[2].split("x"))
    inner = config.mesh.fsdp * config.mesh.tensor
    return ({"data": chips // inner, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor},
            {"data": 1, "fsdp": 16, "tensor": 1}, {"data": 1, "fsdp": 4, "tensor": 4})


def listing(name):
    """Write one line per array that is not a copy of a parameter: path, shape, and its spec on each mesh."""
    parts = state(name)[1]
    leaves = {**dict(named_leaves(parts.params)),
              **{f"extra/{path}": leaf for path, leaf in named_leaves(parts.extra) if not path.startswith("teacher/")}}
    lines = [" | ".join("x".join(f"{axis}={size}" for axis, size in mesh.items()) for mesh in meshes(name)) + "\n"]
    for path, leaf in sorted(leaves.items()):
        specs = (", ".join(map(str, spec(path, leaf.shape, mesh))) or "-" for mesh in meshes(name))
        lines.append(f"{path}  {list(leaf.shape)}  {' | '.join(specs)}\n")
    return "".join(lines)


@pytest.mark.parametrize("name", TARGETS)
def test_golden_shardings(name):
    """Compare with the golden file; after an intended change run `python -m tests.planning.test_recipes`."""
    assert listing(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", TARGETS)
def test_moments_and_momentum_copies_are_sharded_like_their_parameters(name):
    parts = state(name)[1]
    params, copies = dict(named_leaves(parts.params)), 0
    for path, leaf in [*named_leaves(parts.opt), *named_leaves(parts.extra)]:
        tail = next((known for known in params if path.endswith(f"/{known}")), None)
        if tail is not None and leaf.shape == params[tail].shape:
            copies += 1
            for mesh in meshes(name):
                assert spec(path, leaf.shape, mesh) == spec(tail, leaf.shape, mesh), path
    assert copies >= len(params)      # two moments each, of a frozen half none


def test_every_large_recipe_is_here():
    """Check that every recipe without a target topology is one that runs on two cores, or CIFAR-10's on one device."""
    small = {path.stem for path in CONFIGS.glob("*.py")} - set(TARGETS)
    assert small == {"attention_conv_cifar10", "attention_conv_digits", "blip_scenes", "blip_vqa", "capfilt_scenes",
                     "clip_captions", "clip_scenes", "finetune_captions", "finetune_folder", "igpt_digits",
                     "igpt_scenes", "vit_cifar10_patch2", "vit_digits", "vit_folder"}


def headers():
    """Return the headers of recipes with a plan."""
    texts = {name: " ".join((CONFIGS / f"{name}.py").read_text().split('"""')[1].split()) for name in TARGETS}
    return {name: text for name, text in texts.items() if "Plan on" in text}


def test_headers_have_plans_that_fit():
    assert set(headers()) == set(TARGETS)
    for name, text in headers().items():
        plan = rf"Plan on {TARGETS[name]} \(\d+ chips\): fits in [\d.]+ GiB .* \(libtpu [\d.]+\)\."
        assert re.search(plan, text), name


@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: pip install 'jaxmm[tpu]'")
@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_it_fits_its_topology(name):
    """Compile for the target topology: seconds for the smallest, ten minutes on two cores for BLIP's pre-training.

    A header is compared only if the same libtpu made it.
    """
    plan = make_plan(load_recipe(CONFIGS / f"{name}.py"), open_topology(TARGETS[name]))
    assert plan.fits and plan.estimated_utilization > 0.05
    assert plan.peak_bytes >= plan.argument_bytes > 4 * plan.parameters / plan.chips
    if f"(libtpu {importlib.metadata.version('libtpu')})" in headers()[name]:
        assert f"{plan.peak_bytes / 2**30:,.2f} GiB of" in headers()[name]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for recipe in TARGETS:
        (GOLDEN / f"{recipe}.txt").write_text(listing(recipe))
