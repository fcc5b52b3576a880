import math
from dataclasses import dataclass, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig
from jaxmm.inference.batching import predictions
from jaxmm.sharding import make_mesh, place_batch, shardings
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.validation import ConfigError
from tests import reference
from tests.losses.test_contrastive import brute_sigmoid, brute_softmax
from tests.reference import fp64
from tests.tasks.common import SIGMOID, SOFTMAX, B, bf16, pairs, params

TASKS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}
BRUTE = {"softmax": brute_softmax, "sigmoid": brute_sigmoid}
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def numpy_embeddings(task):
    batch = pairs()
    image = (fp64(batch["image"]) / 255 - MEAN) / STD
    return reference.clip(fp64(params(task)), image, np.asarray(batch["tokens"]), task.model)


def positive(duplicates=True):
    """What the ids of `pairs` say."""
    same = np.eye(B, dtype=bool)
    if duplicates:
        same[[0, 5, 2, 7], [5, 0, 7, 2]] = True
    return same


def numpy_loss(task, duplicates=True):
    image, text = numpy_embeddings(task)
    p = params(task)
    logits = np.exp(fp64(p["logit_scale"])) * image @ text.T + fp64(p.get("logit_bias", 0.0))
    return BRUTE[task.kind](logits, positive(duplicates)), logits


@pytest.mark.parametrize("kind", TASKS)
def test_several_captions(kind):
    """The definition, from embeddings in numpy; on eight devices it is the same."""
    task, batch, captions = TASKS[kind], pairs(3), 3
    p = params(task)
    image = (fp64(batch["image"]) / 255 - MEAN) / STD
    image, text = (x for x in reference.clip(fp64(p), image.repeat(captions, axis=0), np.asarray(
        batch["tokens"]).reshape(B * captions, -1), task.model))
    logits = np.exp(fp64(p["logit_scale"])) * image[::captions] @ text.T + fp64(p.get("logit_bias", 0.0))
    same = positive().repeat(captions, axis=1)
    same[[2, 7], [7 * 3 + 2, 2 * 3]] = True
    same[2, [21, 22]] = same[7, [7, 8]] = False         # the same words, but not in these captions
    value, (_, metrics) = run(task, batch)
    np.testing.assert_allclose(value, BRUTE[kind](logits, same), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean([same[i, row.argmax()] for i, row in enumerate(logits)]))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        placed = place_batch(jax.tree.map(np.asarray, batch), mesh)
        spread, (_, measured) = jax.jit(task.loss)(jax.device_put(p, shardings(p, mesh)), {}, placed, jax.random.key(0))
    np.testing.assert_allclose(spread, value, rtol=1e-6)
    assert measured["accuracy"] == metrics["accuracy"]


def run(task, batch, key=0):
    return jax.jit(task.loss)(params(task), {}, batch, jax.random.key(key))


@pytest.mark.parametrize("kind", TASKS)
def test_loss(kind):
    task = TASKS[kind]
    value, (extra, metrics) = run(task, pairs())
    expected, logits = numpy_loss(task)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    hits = [positive()[i, row.argmax()] for i, row in enumerate(logits)]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(hits))
    np.testing.assert_allclose(metrics["logit_scale"], math.exp(1.5), rtol=1e-6)
    assert metrics["logit_bias"] == (-2 if kind == "sigmoid" else 0) and extra == {}


@pytest.mark.parametrize("kind", TASKS)
def test_duplicates_can_be_ignored(kind):
    """By the switch, and where the batch has no ids at all."""
    task = TASKS[kind]
    batch = pairs()
    expected, _ = numpy_loss(task, duplicates=False)
    assert abs(expected - numpy_loss(task)[0]) > 0.01
    value, _ = run(replace(task, duplicates=False), batch)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    value, _ = run(task, {name: batch[name] for name in ("image", "tokens")})
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", TASKS)
def test_predict(kind):
    task = TASKS[kind]
    assert set(predictions(task)) == {"image", "text", "features"}
    out = {name: jax.jit(f)(params(task), pairs()) for name, f in predictions(task).items()}
    image, text = numpy_embeddings(task)
    np.testing.assert_allclose(out["image"], image, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out["text"], text, rtol=1e-3, atol=1e-4)
    for name in ("image", "text"):
        np.testing.assert_allclose(np.linalg.norm(out[name], axis=1), 1, rtol=1e-5)
    assert out["features"].shape == (B, 12) and {x.dtype for x in out.values()} == {np.dtype("float32")}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("kind", TASKS)
def test_bf16(kind):
    task = TASKS[kind]
    half = bf16(task)

    def loss(params):
        return half.loss(params, {}, pairs(), jax.random.key(0))[0]

    value = jax.jit(loss)(params(task))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, numpy_loss(task)[0], rtol=0.05)
    grads = jax.eval_shape(jax.grad(loss), params(task))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
    outputs = jax.eval_shape(half.encode, params(task), pairs(), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {np.dtype("float32")}


def test_scale_is_held_between_1_and_100():
    (pattern, low, high), = SOFTMAX.clamps
    assert pattern == "^logit_scale$" and math.exp(low) == 1
    np.testing.assert_allclose(math.exp(high), 100)
    assert SIGMOID.clamps == ()                        # SigLIP's own goes beyond


@dataclass(frozen=True)
class Words:
    """A tokenizer, as far as a task looks."""

    context_length: int = 7
    vocab_size: int = 9
    eos_id: int = 8
    pad_id: int = 0


def with_text(**fields):
    return replace(SOFTMAX, model=replace(SOFTMAX.model, text=replace(SOFTMAX.model.text, **fields)))


def bind(task, **fields):
    return task.bind(**{"image_size": 6, "classes": None, "tokenizer": Words()} | fields)


def test_bind():
    assert bind(SOFTMAX) == SOFTMAX
    assert bind(with_text(vocab_size=None)).model.text.vocab_size == 9
    assert bind(with_text(pool="eos")).model.text.eos_id == 8
    assert bind(with_text(pool="eos", eos_id=6)).model.text.eos_id == 6


@pytest.mark.parametrize("fields, message", [
    ({"image_size": 8}, "data.image.size is 8; expected the model's task.model.vision.image_size = 6"),
    ({"tokenizer": None}, "data.train has no texts"),
    ({"tokenizer": Words(context_length=9)}, "data.tokenizer.context_length is 9; expected .* = 7"),
    ({"tokenizer": Words(eos_id=4)}, "task.model.text.pool is 'argmax'; expected eos: this tokenizer's end token is 4"),
    ({"tokenizer": Words(vocab_size=12)}, "task.model.text.vocab_size is 11; expected None, or at least .* 12")])
def test_bind_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        bind(SOFTMAX, **fields)


def test_bind_refuses_another_padding():
    with pytest.raises(ConfigError, match=r"task\.model\.text\.pad_id is 3; expected None, or the tokenizer's 0"):
        bind(with_text(pad_id=3))


def test_sigmoid_needs_a_bias():
    with pytest.raises(ConfigError, match=r"task\.model\.logit_bias is None; expected a number"):
        ContrastiveLearning(model=SOFTMAX.model, kind="sigmoid")


class Variants(chex.TestCase):
    """The whole loss with jit, without, and under pmap."""

    def check(self, task):
        loss = self.variant(lambda p, batch, rng: task.loss(p, {}, batch, rng)[0], n_devices=2)
        np.testing.assert_allclose(loss(params(task), pairs(), jax.random.key(0)), numpy_loss(task)[0], rtol=1e-4)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_softmax(self):
        self.check(SOFTMAX)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_sigmoid(self):
        self.check(SIGMOID)


@pytest.mark.long
class Eager(Variants):
    """Without jit, one operation after the other."""

    @chex.variants(without_jit=True)
    def test_softmax(self):
        self.check(SOFTMAX)

    @chex.variants(without_jit=True)
    def test_sigmoid(self):
        self.check(SIGMOID)
