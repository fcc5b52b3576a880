"""Where every parameter lies. `python -m tests.test_sharding` writes the golden listings in tests/golden anew."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmm.config import MeshConfig, OptimizerConfig
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.models.clip import clip, siglip
from jaxmm.models.igpt import igpt
from jaxmm.models.vit import vit
from jaxmm.sharding import (
    all_gather_params,
    batch_shards,
    constrain_batch,
    constrain_replicated,
    make_mesh,
    named_leaves,
    path_name,
    place_batch,
    platform,
    shardings,
    spec,
    unsharded_dims,
)
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.generative_classification import GenerativeClassification
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.optimizer import make_optimizer
from jaxmm.validation import ConfigError
from tests.tasks.common import SOFTMAX

GOLDEN = Path(__file__).parent / "golden"
AXES = {"data": 2, "fsdp": 2, "tensor": 2}
PUBLISHED = {
    "vit_b16": Classification(model=vit("B/16", classes=1000, pre_logits=768, registers=4)),
    "attention_conv": Classification(model=AttentionConvConfig(scores="learned_content", classes=10)),
    "clip_b32": ContrastiveLearning(model=clip("ViT-B-32")),
    "siglip_b16": ContrastiveLearning(model=siglip("B/16"), kind="sigmoid"),
    "igpt_s": GenerativeClassification(model=igpt("S", classes=1000)),
}


def listing(task):
    """A parameter a line: its path, shape and spec on a mesh of 2 x 2 x 2."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    lines = []
    for name, leaf in sorted(named_leaves(params)):
        entries = ", ".join(str(entry) for entry in spec(name, leaf.shape, AXES))
        lines.append(f"{name}  {list(leaf.shape)}  ({entries})\n")
    return "".join(lines)


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden(name):
    """Paths, shapes and specs are a contract with every checkpoint: after a wanted change, run

        python -m tests.test_sharding
    """
    assert listing(PUBLISHED[name]) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name, shape, expected", [
    ("encoder/blocks/attention/query/kernel", (3, 8, 4, 6), P(None, "fsdp", "tensor")),
    ("map_head/attention/query/kernel", (8, 4, 6), P("fsdp", "tensor")),
    ("encoder/blocks/attention/value/bias", (3, 4, 6), P(None, "tensor")),
    ("encoder/blocks/attention/out/kernel", (3, 4, 6, 8), P(None, "tensor", None, "fsdp")),
    ("encoder/blocks/attention/out/bias", (3, 8), P()),
    ("text/encoder/blocks/mlp/up/kernel", (3, 8, 10), P(None, "fsdp", "tensor")),
    ("text/encoder/blocks/mlp/up/bias", (3, 10), P(None, "tensor")),
    ("text/encoder/blocks/mlp/down/kernel", (3, 10, 8), P(None, "tensor", "fsdp")),
    ("patches/kernel", (4, 4, 3, 8), P(None, None, None, "fsdp")),
    ("text/tokens/embedding", (50, 8), P("tensor", "fsdp")),
    ("head/kernel", (8, 10), P("fsdp", "tensor")),
    ("vision_projection/kernel", (8, 6), P("fsdp")),
    ("encoder/blocks/mlp_norm/scale", (3, 8), P()),
    ("logit_scale", (), P()),
])
def test_rules(name, shape, expected):
    """The layer axis in front is free, whatever it is; the same rule serves a layer that is not stacked."""
    assert spec(name, shape, AXES) == expected


def test_dimensions_that_do_not_divide_are_replicated_and_told():
    assert spec("mlp/up/kernel", (8, 9), AXES) == P("fsdp")
    assert spec("mlp/up/kernel", (7, 10), AXES) == P(None, "tensor")
    assert spec("mlp/up/kernel", (7, 9), AXES) == P()
    mesh = make_mesh(MeshConfig(**AXES))
    assert unsharded_dims({"mlp": {"up": {"kernel": jnp.zeros((8, 9))}}}, mesh) == [
        "mlp/up/kernel: dimension 1 of (8, 9) is not divisible by tensor = 2 and is replicated"]
    assert len(unsharded_dims({"mlp": {"up": {"kernel": jnp.zeros((7, 9))}}}, mesh)) == 2
    assert unsharded_dims({"mlp": {"up": {"kernel": jnp.zeros((8, 10)), "bias": jnp.zeros(10)}}}, mesh) == []


def test_axes_of_one_device_are_left_out():
    assert spec("mlp/up/kernel", (7, 10), {"data": 8, "fsdp": 1, "tensor": 1}) == P()


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    """Copies of a parameter anywhere in the optimizer's state get its spec."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.eval_shape(SOFTMAX.init, jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(name=name, freeze=("^vision/patches/",)), params, 10, SOFTMAX.clamps)
    state = jax.eval_shape(optimizer.tx.init, params)
    wanted = {path: (leaf.shape, where.spec) for (path, leaf), where in zip(
        named_leaves(params), jax.tree.leaves(shardings(params, mesh)), strict=True)}
    copies = 0
    for (path, leaf), where in zip(named_leaves(state), jax.tree.leaves(shardings(state, mesh)), strict=True):
        owner = [name for name in wanted if path.endswith(name) and wanted[name][0] == leaf.shape]
        if owner:
            assert where.spec == wanted[max(owner, key=len)][1], path
            copies += 1
    trained = [path for path in wanted if not path.startswith("vision/patches/")]
    matrices = [path for path in trained if "/blocks/" in path and path.endswith("kernel")]
    more = {"adamw": len(trained), "adafactor": len(trained), "muon": len(trained) - len(matrices)}
    assert copies == len(trained) + more.get(name, 0)


def test_factored_moments_are_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = {"encoder": {"blocks": {"mlp": {"up": {"kernel": jnp.zeros((2, 64, 128))}}}}}
    optimizer = make_optimizer(OptimizerConfig(name="adafactor"), params, 10)
    state = jax.eval_shape(optimizer.tx.init, params)
    where = dict(zip((name for name, _ in named_leaves(state)), jax.tree.leaves(shardings(state, mesh)), strict=True))
    factored = {name: leaf.shape for name, leaf in named_leaves(state) if "/v_row/" in name or "/v_col/" in name}
    assert sorted(factored.values()) == [(2, 64), (2, 128)]
    assert all(where[name].spec == P() for name in factored)
    assert P(None, "fsdp", "tensor") in [place.spec for place in where.values()]       # the first moment


def test_shards_are_what_the_spec_says():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    tree = {"mlp": {"up": {"kernel": jnp.zeros((3, 8, 10)), "bias": jnp.zeros((3, 10))}}}
    placed = jax.device_put(tree, shardings(tree, mesh))["mlp"]["up"]
    assert placed["kernel"].addressable_shards[0].data.shape == (3, 2, 5)
    assert placed["bias"].addressable_shards[0].data.shape == (3, 5)


@pytest.mark.parametrize("config, shape", [
    (MeshConfig(), (8, 1, 1)), (MeshConfig(fsdp=4), (2, 4, 1)), (MeshConfig(data=1, fsdp=2, tensor=2), (1, 2, 2)),
    (MeshConfig(data=2), (2, 1, 1))])
def test_make_mesh(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]
    assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize("config, message", [
    (MeshConfig(fsdp=3), "mesh.fsdp x mesh.tensor is 3 x 1 = 3; expected a divisor of the 8 devices"),
    (MeshConfig(fsdp=4, tensor=4), "mesh.fsdp x mesh.tensor is 4 x 4 = 16; expected a divisor"),
    (MeshConfig(data=3, fsdp=4), r"is 3 x 4 x 1 = 12 devices; this run has 8 \(cpu\)")])
def test_make_mesh_refuses(config, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


def test_place_batch():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = place_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.spec == P(("data", "fsdp"))
    for shard in placed.addressable_shards:
        assert shard.data.shape == (2, 3)


def test_constraints():
    """Nothing outside a mesh; inside one, the leading axis over data and fsdp, or everything everywhere."""
    x = jnp.arange(24.0).reshape(8, 3)
    assert constrain_batch(x) is x and constrain_replicated(x) is x
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        batch, full = jax.jit(lambda x: (constrain_batch(x * 2), constrain_replicated(x * 2)))(x)
    assert batch.sharding.spec == P(("data", "fsdp")) and batch.addressable_shards[0].data.shape == (2, 3)
    assert full.sharding.is_fully_replicated
    np.testing.assert_array_equal(batch, full)


def test_path_name():
    tree = {"a": (1, {"b": 2}), "c": np.zeros(3)}
    assert dict(named_leaves({"a": tree["a"]})) == {"a/0": 1, "a/1/b": 2}
    assert path_name(jax.tree_util.tree_leaves_with_path(tree)[-1][0]) == "c"


@pytest.mark.parametrize("mesh, expected", [
    (MeshConfig(fsdp=4, tensor=2), P(None, "tensor")), (MeshConfig(data=2, fsdp=2, tensor=2), P("fsdp", "tensor"))])
def test_a_parameter_is_gathered_where_nothing_else_divides_the_batch(mesh, expected):
    name, x = "mlp/up/kernel", jnp.arange(32.0).reshape(4, 8)
    mesh = make_mesh(mesh, jax.devices()[:8])
    cut = jax.device_put(x, NamedSharding(mesh, P("fsdp", "tensor")))
    with jax.set_mesh(mesh):
        listed = jax.jit(lambda x: all_gather_params(x, name))(cut)
        assert platform() == "cpu"
    assert listed.sharding.is_equivalent_to(NamedSharding(mesh, expected), 2)
    np.testing.assert_array_equal(listed, x)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for published, task in PUBLISHED.items():
        (GOLDEN / f"{published}.txt").write_text(listing(task))
