import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.config import OptimizerConfig
from jaxmm.sharding import named_leaves
from jaxmm.training.optimizer import layer_scales, learning_rate, make_optimizer, matching
from jaxmm.validation import ConfigError
from tests.pretrained import tiny
from tests.reference import random_like
from tests.tasks.common import SIGMOID, SOFTMAX
from tests.tasks.test_blip import TASK as BLIP_TASK
from tests.training.common import model_task

PLAIN = {"schedule": "constant", "warmup": 0.0, "clip": None}
TREE = {"layer": {"kernel": jnp.asarray([[3.0, -4.0]]), "bias": jnp.asarray([2.0])}, "norm": {"scale": jnp.ones(2)}}


def optimizer(params, clamps=(), steps=100, **fields):
    return make_optimizer(OptimizerConfig(**PLAIN | fields), params, steps, clamps)


def step(tx, params, grads, state=None):
    """New parameters and state after one update."""
    updates, state = tx.update(grads, tx.init(params) if state is None else state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("fields, expected", [
    ({"schedule": "cosine", "warmup": 10}, {0: 0, 5: 0.5, 10: 1, 35: (1 + math.cos(math.pi / 4)) / 2, 60: 0.5, 110: 0}),
    ({"schedule": "cosine", "warmup": 10, "final": 0.1}, {10: 1, 60: 0.55, 110: 0.1}),
    ({"schedule": "linear", "warmup": 10, "final": 0.2}, {5: 0.5, 10: 1, 60: 0.6, 110: 0.2}),
    ({"schedule": "constant", "warmup": 0}, {0: 1, 50: 1, 110: 1}),
    ({"schedule": "constant", "warmup": 0.1, "cooldown": 0.2}, {0: 0, 11: 1, 87: 1, 88: 1, 99: 0.5, 110: 0}),
    ({"schedule": "exponential", "warmup": 10, "final": 0.01}, {5: 0.5, 10: 1, 60: 0.1, 110: 0.01}),
    ({"schedule": "rsqrt", "warmup": 4}, {2: 0.5, 4: 1, 16: 0.5, 64: 0.25, 100: 0.2}),
    ({"schedule": "rsqrt", "warmup": 4, "cooldown": 20}, {64: 0.25, 100: 0.1, 110: 0}),
    ({"schedule": "cosine", "warmup": 10, "cooldown": 50}, {10: 1, 60: 0.5, 85: (1 - math.cos(math.pi / 4)) / 4}),
])
def test_learning_rate(fields, expected):
    schedule = learning_rate(OptimizerConfig(learning_rate=3.0, **fields), 110)
    steps = jnp.asarray(list(expected))
    np.testing.assert_allclose(jax.vmap(schedule)(steps), [3 * rate for rate in expected.values()], atol=1e-5)


def test_warmup_and_cooldown_must_fit():
    with pytest.raises(ConfigError, match=r"optimizer.warmup \+ optimizer.cooldown is 12; expected at most steps = 10"):
        learning_rate(OptimizerConfig(warmup=8, cooldown=4), 10)


@cache
def clip_params():
    return random_like(jax.eval_shape(SIGMOID.init, jax.random.key(0)))


def test_decay_touches_kernels_and_embeddings_only():
    """With a gradient of zero, all that changes is what decays: by rate times decay of itself."""
    params = clip_params()
    tx = optimizer(params, learning_rate=0.5, weight_decay=0.1).tx
    new, _ = jax.jit(lambda p: step(tx, p, jax.tree.map(jnp.zeros_like, p)))(params)
    touched = set()
    for (name, before), (_, after) in zip(named_leaves(params), named_leaves(new), strict=True):
        if not np.array_equal(before, after):
            touched.add(name)
            np.testing.assert_allclose(after, before * 0.95, rtol=1e-5)
    assert touched == {name for name, _ in named_leaves(params) if name.split("/")[-1] in ("kernel", "embedding")}
    assert {"text/tokens/embedding", "vision/patches/kernel", "vision/map_head/attention/query/kernel"} <= touched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_makes_the_matrices_of_layers_orthogonal_and_leaves_the_rest_to_adam(dtype):
    """Against singular values: the update of a matrix has its momentum's singular vectors and about equal values."""
    params = {"encoder": {"blocks": {"attention": {"query": {"kernel": jnp.zeros((2, 12, 3, 4))},
                                                   "out": {"kernel": jnp.zeros((2, 3, 4, 10))}},
                                     "mlp": {"up": {"kernel": jnp.zeros((2, 10, 18))}}}},
              "patches": {"kernel": jnp.zeros((2, 2, 3, 14))}, "head": {"kernel": jnp.zeros((6, 5))}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    tx = optimizer(params, name="muon", learning_rate=1.0, momentum=0.9, moment_dtype=dtype).tx
    new, state = step(tx, params, grads)
    new, _ = step(tx, new, jax.tree.map(jnp.zeros_like, grads), state)
    flat = dict(named_leaves(new))
    for name, rows, columns in (("encoder/blocks/attention/query/kernel", 12, 12),
                                ("encoder/blocks/attention/out/kernel", 12, 10),
                                ("encoder/blocks/mlp/up/kernel", 10, 18), ("patches/kernel", 12, 14)):
        for update, gradient in zip(flat[name].reshape(-1, rows, columns),
                                    dict(named_leaves(grads))[name].reshape(-1, rows, columns), strict=True):
            u, _, v = np.linalg.svd(np.asarray(gradient), full_matrices=False)
            ratio = -u.T @ np.asarray(update, np.float64) @ v.T / (2 * 0.2 * max(rows, columns)**0.5)
            assert np.abs(ratio - np.diag(np.diag(ratio))).max() < 0.02 and np.all(np.abs(np.diag(ratio) - 1) < 0.35)
    adam = optimizer(params, learning_rate=1.0, moment_dtype=dtype).tx
    want, state = step(adam, params, grads)
    want, _ = step(adam, want, jax.tree.map(jnp.zeros_like, grads), state)
    np.testing.assert_allclose(flat["head/kernel"], want["head"]["kernel"], rtol=1e-6)


def test_adamw_by_hand():
    """Two steps: bias-corrected moments, decoupled decay."""
    b1, b2, eps, rate, decay = 0.9, 0.99, 1e-3, 0.1, 0.2
    tx = optimizer(TREE, learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay).tx
    grads = [jax.tree.map(lambda p, k=k: jnp.cos(p * (k + 1)), TREE) for k in range(2)]
    params, state = TREE, None
    for g in grads:
        params, state = step(tx, params, g, state)
    for name in ("kernel", "bias"):
        x, m, v = np.float64(np.asarray(TREE["layer"][name])), 0, 0
        for t, g in enumerate(grads, start=1):
            g = np.float64(np.asarray(g["layer"][name]))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            update = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            x = x - rate * (update + (decay * x if name == "kernel" else 0))
        np.testing.assert_allclose(params["layer"][name], x, rtol=1e-5)


def test_lion_and_sgd_by_hand():
    grads = jax.tree.map(jnp.sin, TREE)
    new, _ = step(optimizer(TREE, name="lion", learning_rate=0.1).tx, TREE, grads)
    np.testing.assert_allclose(new["layer"]["kernel"], [[3 - 0.1, -4 - 0.1]], rtol=1e-6)  # sin 3 > 0, sin -4 > 0
    tx = optimizer(TREE, name="sgd", learning_rate=0.1, momentum=0.5).tx
    first, state = step(tx, TREE, grads)
    second, _ = step(tx, first, grads, state)
    np.testing.assert_allclose(second["layer"]["bias"], 2 - 0.1 * math.sin(2) * (1 + 1.5), rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_every_optimizer_descends(name):
    """A quadratic, with one matrix large enough for Adafactor to factor its moments."""
    params = {"big": {"kernel": jnp.ones((128, 130))}, "small": {"bias": jnp.full(3, -2.0)}}
    tx = optimizer(params, name=name, learning_rate=0.02, weight_decay=0.01, clip=1e3).tx

    def loss(p):
        return sum((leaf**2).mean() for leaf in jax.tree.leaves(p))

    @jax.jit
    def descend(params):
        def body(_, carry):
            return step(tx, carry[0], jax.grad(loss)(carry[0]), carry[1])
        return jax.lax.fori_loop(0, 40, body, (params, tx.init(params)))[0]

    new = descend(params)
    for name, leaf in named_leaves(new):
        assert (np.abs(leaf) < np.abs(dict(named_leaves(params))[name])).all()
    assert loss(new) < 0.95 * loss(params)


def test_adafactor_factors():
    params = {"big": {"kernel": jnp.ones((128, 130))}}
    state = jax.eval_shape(optimizer(params, name="adafactor", b1=0.0).tx.init, params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes[-1] == 128 * 130 and sizes[-2] == 130 and sizes[-3] == 128, "first moment, rows, columns"


def test_adafactors_first_moment_is_not_debiased():
    """The first update is 1 - b1 of the clipped one, whose largest entries are of size 1."""
    params = {"bias": jnp.full(3, 2.0)}
    tx = optimizer(params, name="adafactor", b1=0.9, learning_rate=0.5, weight_decay=0.0).tx
    new, _ = step(tx, params, {"bias": jnp.full(3, 0.3)})
    np.testing.assert_allclose(new["bias"], 2 - 0.5 * (1 - 0.9), rtol=1e-4)


def test_moments_in_bf16():
    for name in ("adamw", "lion", "sgd", "adafactor", "muon"):
        state = jax.eval_shape(optimizer(TREE, name=name, moment_dtype="bfloat16").tx.init, TREE)
        halves = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
        assert sorted(halves) == [(1,), (1, 2), (2,)], name


def test_clip():
    grads = {"layer": {"kernel": jnp.asarray([[6.0, 0.0]]), "bias": jnp.asarray([-8.0])},
             "norm": {"scale": jnp.zeros(2)}}
    for clip, scale in ((1.0, 0.1), (20.0, 1.0), (None, 1.0)):
        new, _ = step(optimizer(TREE, name="sgd", momentum=0.0, learning_rate=1.0, clip=clip).tx, TREE, grads)
        np.testing.assert_allclose(new["layer"]["kernel"], [[3 - 6 * scale, -4]], rtol=1e-5)
        np.testing.assert_allclose(new["layer"]["bias"], [2 + 8 * scale], rtol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"layer_decay": 0.5, "multipliers": (("^text/", 0.5),)}])
def test_freeze(extra):
    """Locked-image tuning: bit for bit as it was, no moments, no gradient asked for; the rest learns."""
    params = clip_params()
    config = {"learning_rate": 0.1, "weight_decay": 0.1, "freeze": ("^vision/",), **extra}
    made = optimizer(params, clamps=SIGMOID.clamps, **config)
    state = jax.eval_shape(made.tx.init, params)
    assert not [name for name, _ in named_leaves(state) if "vision" in name.split("/")]
    trained = sum(leaf.size for name, leaf in named_leaves(params) if not name.startswith("vision/"))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 2 * trained + 4

    once = jax.jit(lambda p, state: step(made.tx, p, jax.tree.map(jnp.ones_like, p), state))
    new, state = once(params, made.tx.init(params))
    new, _ = once(new, state)
    for (name, before), (_, after) in zip(named_leaves(params), named_leaves(new), strict=True):
        assert np.array_equal(before, after) == name.startswith("vision/"), name
    grads = jax.grad(lambda p: sum((leaf**2).sum() for leaf in jax.tree.leaves(made.stop_frozen_gradients(p))))(params)
    for name, leaf in named_leaves(grads):
        assert np.any(leaf) != name.startswith("vision/"), name


@pytest.mark.parametrize("start, sign, end", [(4.5, -1.0, 100.0), (0.2, 1.0, 1.0)])
def test_logit_scale_stays_between_1_and_100(start, sign, end):
    """Whatever the gradient asks for; other parameters are not cut."""
    params = {"logit_scale": jnp.float32(start), "text": {"logit_scale": jnp.float32(start)}}
    tx = optimizer(params, clamps=SOFTMAX.clamps, name="sgd", learning_rate=1.0, momentum=0.0).tx
    state = tx.init(params)
    for _ in range(3):
        params, state = step(tx, params, jax.tree.map(lambda p: jnp.full_like(p, sign * 3), params), state)
        np.testing.assert_allclose(np.exp(np.float64(params["logit_scale"])), end, rtol=1e-6)
    np.testing.assert_allclose(params["text"]["logit_scale"], start - sign * 9, rtol=1e-5)
    params, _ = step(tx, params, jax.tree.map(lambda p: jnp.full_like(p, -sign), params), state)
    assert abs(np.exp(params["logit_scale"]) - end) > 0.5, "it can come back"


def test_layer_scales():
    """Three layers at a half: 1/8, 1/4, 1/2, below them 1/16, above them 1; each tower by its own depth."""
    def tower(depth):
        return {"patches": {"kernel": 0, "bias": 0}, "positions": 0, "class_token": 0, "registers": 0,
                "pre_norm": {"scale": 0}, "norm": {"scale": 0}, "map_head": {"probe": 0},
                "encoder": {"blocks": {"mlp": {"kernel": np.zeros((depth, 2, 5)), "bias": np.zeros((depth, 4))}}}}

    params = {"vision": tower(3), "text": tower(2) | {"tokens": {"embedding": 0}}, "logit_scale": 0,
              "text_projection": {"kernel": 0}}
    scales = dict(named_leaves(layer_scales(params, 0.5)))
    for tower, depth in (("vision", 3), ("text", 2)):
        factors = [0.5 ** (depth - i) for i in range(depth)]
        kernel = scales[f"{tower}/encoder/blocks/mlp/kernel"]
        assert kernel.shape == (depth, 1, 1) and kernel.ravel().tolist() == factors
        assert scales[f"{tower}/encoder/blocks/mlp/bias"].ravel().tolist() == factors
        below = ["patches/kernel", "patches/bias", "positions", "class_token", "registers", "pre_norm/scale"]
        below += ["tokens/embedding"] if tower == "text" else []
        assert {float(scales[f"{tower}/{name}"]) for name in below} == {0.5 ** (depth + 1)}
        assert {float(scales[f"{tower}/{name}"]) for name in ("norm/scale", "map_head/probe")} == {1.0}
    assert scales["logit_scale"] == scales["text_projection/kernel"] == 1
    alone = dict(named_leaves(layer_scales(params["vision"], 0.5)))
    for name, scale in alone.items():
        np.testing.assert_array_equal(scale, scales[f"vision/{name}"])


LAYERS = {2: [0.25, 0.5], 3: [0.125, 0.25, 0.5]}
"""Factors of the layers of a tower of that depth at a half, by hand."""
IMAGE_STEM = ("vision/patches/", "vision/positions", "vision/class_token")


@pytest.mark.parametrize("task, towers", [
    (model_task("vit"), [("", 2, ("patches/", "positions", "class_token"))]),
    (model_task("clip"), [("vision/", 2, (*IMAGE_STEM, "vision/pre_norm/")),
                          ("text/", 3, ("text/tokens/", "text/positions"))]),
    (BLIP_TASK, [("vision/", 3, IMAGE_STEM), ("text/", 3, ("text/embedding/",))]),
    (tiny.ANSWERER, [("vision/", 3, IMAGE_STEM), ("text/", 3, ("text/embedding/",)),
                     ("answer/", 3, ("answer/embedding/",))]),
    (tiny.PAIR, [("vision/", 3, IMAGE_STEM), ("text/", 3, ("text/embedding/",))]),
], ids=["vit", "clip", "blip", "vqa", "nlvr"])
def test_every_parameter_of_a_model_has_a_layer(task, towers):
    """All towers decay by their own depth: BLIP's text transformers too."""
    params = jax.eval_shape(task.init, jax.random.key(0))
    scales, below = dict(named_leaves(layer_scales(params, 0.5))), 0
    for name, leaf in named_leaves(params):
        depth, stem = next(((depth, stem) for tower, depth, stem in towers if name.startswith(tower)), (0, ("?",)))
        if "blocks/" in name:
            assert leaf.shape[0] == depth
            expected = LAYERS[depth]
        elif name.startswith("text/merge/"):
            expected = [0.5]
        elif name.startswith(stem):
            expected, below = [LAYERS[depth][0] / 2], below + 1
        else:
            expected = [1.0]
        assert scales[name].ravel().tolist() == expected, name
    assert below >= 3 * len(towers)
    assert len([name for name in scales if "blocks/" in name]) > 10 * len(towers)


def test_layer_decay_refuses_parameters_of_no_layer():
    params = {"encoder": {"blocks": {"kernel": jnp.ones((2, 3))}}, "adapter": {"kernel": jnp.ones(3)}}
    with pytest.raises(ConfigError, match=r"layer_decay is 0\.5, but these parameters belong to no layer: adapter/k"):
        optimizer(params, layer_decay=0.5)
    with pytest.raises(ConfigError, match=r"no layer: layer/bias, layer/kernel, norm/scale; expected stacks"):
        optimizer(TREE, layer_decay=0.5)
    optimizer(params, layer_decay=0.5, multipliers=(("^adapter/", 1.0),))
    optimizer(TREE, layer_decay=1.0)


def test_multipliers_and_layer_decay_multiply_the_learning_rate():
    """The first pattern that matches counts; decay is scaled with the rest of the update."""
    params = {"encoder": {"blocks": {"kernel": jnp.ones((2, 3))}}, "head": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}}
    tx = optimizer(params, name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.5, layer_decay=0.5,
                   multipliers=(("^head/bias$", 0.1), ("^head/", 10.0))).tx
    new, _ = step(tx, params, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_allclose(new["encoder"]["blocks"]["kernel"][:, 0], [1 - 0.25 * 1.5, 1 - 0.5 * 1.5], rtol=1e-6)
    np.testing.assert_allclose(new["head"]["kernel"], 1 - 10 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(new["head"]["bias"], 1 - 0.1, rtol=1e-6)


def test_schedule_runs_inside_the_chain():
    """The first step of a warm-up does nothing; the second learns at the second rate."""
    tx = optimizer(TREE, name="sgd", momentum=0.0, learning_rate=1.0, warmup=4).tx
    grads = jax.tree.map(jnp.ones_like, TREE)
    first, state = step(tx, TREE, grads)
    second, _ = step(tx, first, grads, state)
    np.testing.assert_array_equal(first["layer"]["bias"], TREE["layer"]["bias"])
    np.testing.assert_allclose(second["layer"]["bias"], [1.75])


def test_matching():
    hits = matching(TREE, (r"^layer/.*l$", "scale"))
    assert hits == {"layer": {"kernel": True, "bias": False}, "norm": {"scale": True}}


@pytest.mark.parametrize("fields, message", [
    ({"freeze": ("^visoin/",)}, r"optimizer.freeze has '\^visoin/', which matches none of the 3 parameters, such as l"),
    ({"multipliers": (("head", 2.0),)}, "optimizer.multipliers has 'head', which matches none of the 3"),
    ({"freeze": (".",)}, r"optimizer.freeze is \('.',\), which leaves nothing to train")])
def test_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        optimizer(TREE, **fields)
