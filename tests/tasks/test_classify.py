from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.inference.batching import predictions
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.tasks.image_classification import Classification
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import fp64
from tests.tasks.common import CLASSES, CLASSIFY, VISION, B, bf16, labelled, params


def numpy_logits():
    image = fp64(labelled()["image"]) / 127.5 - 1
    return reference.vit(fp64(params(CLASSIFY)), image, CLASSIFY.model)[2]


def numpy_loss(smoothing=0.0):
    labels = np.asarray(labelled()["label"])
    targets = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
    return -(targets * reference.log_softmax(numpy_logits(), 1)).sum(axis=1).mean()


def run(task, batch=None, key=0):
    loss = jax.jit(task.loss)(params(CLASSIFY), {}, labelled() if batch is None else batch, jax.random.key(key))
    value, (extra, metrics) = loss
    assert extra == {}
    return value, metrics


def test_loss_and_accuracy():
    value, metrics = run(replace(CLASSIFY, label_smoothing=0.1))
    np.testing.assert_allclose(value, numpy_loss(0.1), rtol=1e-4)
    expected = (numpy_logits().argmax(axis=1) == np.asarray(labelled()["label"])).mean()
    np.testing.assert_allclose(metrics["accuracy"], expected)


def test_sigmoid_loss():
    value, _ = run(replace(CLASSIFY, kind="sigmoid"))
    chance = 1 / (1 + np.exp(-numpy_logits()))
    right = np.eye(CLASSES, dtype=bool)[np.asarray(labelled()["label"])]
    np.testing.assert_allclose(value, -np.log(np.where(right, chance, 1 - chance)).sum(axis=1).mean(), rtol=1e-4)


def test_prepare_mixes_as_asked():
    batch, rng = labelled(), [jax.random.key(i) for i in range(8)]
    plain = CLASSIFY.prepare(batch, rng[0])
    np.testing.assert_array_equal(plain["image"], batch["image"])
    np.testing.assert_array_equal(plain["target"], np.eye(CLASSES)[np.asarray(batch["label"])])

    def kinds(task):
        """Whether whole pictures were blended: a pasted rectangle leaves every pixel one of two."""
        prepare = jax.jit(task.prepare)
        found = []
        for key in rng:
            image = np.asarray(prepare(batch, key)["image"])
            original = np.asarray(batch["image"], np.float32)
            pasted = (image == original) | (image == np.roll(original, 1, axis=0))
            found.append("cutmix" if pasted.all() else "mixup")
        return set(found)

    assert kinds(replace(CLASSIFY, mixup=1.0)) == {"mixup"}
    assert kinds(replace(CLASSIFY, cutmix=1.0)) == {"cutmix"}
    assert kinds(replace(CLASSIFY, mixup=1.0, cutmix=1.0)) == {"mixup", "cutmix"}


def test_predict():
    predicted = {name: jax.jit(f)(params(CLASSIFY), labelled()) for name, f in predictions(CLASSIFY).items()}
    assert set(predicted) == {"logits", "image", "features"}
    np.testing.assert_array_equal(predicted["image"], predicted["features"])
    np.testing.assert_allclose(predicted["logits"], numpy_logits(), rtol=1e-3, atol=1e-4)
    assert predicted["features"].shape == (B, 12) and predicted["features"].dtype == jnp.float32


def test_self_attention_as_convolution():
    """The same task with the other kind of model."""
    model = AttentionConvConfig(width=12, depth=1, heads=4, mlp_dim=10, image_size=6, classes=CLASSES, dropout=0.0,
                                attention_dropout=0.0)
    task = Classification(model=model)
    value, (_, metrics) = jax.jit(task.loss)(params(task), {}, labelled(), jax.random.key(0))
    logits = reference.attention_conv(fp64(params(task)), fp64(labelled()["image"]) / 127.5 - 1, model)[2]
    labels = np.asarray(labelled()["label"])
    np.testing.assert_allclose(value, -reference.log_softmax(logits, 1)[np.arange(B), labels].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(axis=1) == labels).mean())
    assert from_dict(to_dict(task)) == task and from_dict(to_dict(CLASSIFY)) == CLASSIFY


def test_a_start_from_trained_parameters():
    """Architecture and parameters of the same kind of model, but for the head; another kind is refused."""
    trained = Classification(model=AttentionConvConfig(scores="learned", width=30, classes=7))
    task = Classification(model=AttentionConvConfig(width=20, dropout=0.3, remat="full"))
    adopted = task.adopt(trained, 16)
    assert adopted.model == AttentionConvConfig(scores="learned", width=30, image_size=16, dropout=0.3, remat="full")
    path = "encoder/blocks/attention/row_embedding"
    assert adopted.trained_path(path, trained) == path and adopted.trained_path("head/bias", trained) is None
    assert adopted.position_grid(path) is None
    assert task.adopt(CLASSIFY, 6) is None and CLASSIFY.adopt(trained, 6) is None


@pytest.mark.standard_promotion
def test_bf16():
    half = bf16(CLASSIFY)
    value, grads = jax.jit(jax.value_and_grad(lambda p: half.loss(p, {}, labelled(), jax.random.key(0))[0]))(
        params(CLASSIFY))
    logits = jax.jit(half.classifier.logits)(params(CLASSIFY), labelled())
    assert value.dtype == logits.dtype == jnp.float32
    np.testing.assert_allclose(value, numpy_loss(), rtol=0.05)
    fresh = jax.eval_shape(half.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_bind():
    task = Classification(model=VISION)
    assert task.bind(image_size=6, classes=3, tokenizer=None).model.classes == 3
    assert CLASSIFY.bind(image_size=6, classes=CLASSES, tokenizer=None) == CLASSIFY


@pytest.mark.parametrize("fields, message", [
    ({"image_size": 8}, "data.image.size is 8; expected the model's task.model.image_size = 6"),
    ({"classes": None}, "data.train has no labels"),
    ({"classes": 4}, "task.model.classes is 5; expected None, or the source's 4")])
def test_bind_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        CLASSIFY.bind(**{"image_size": 6, "classes": CLASSES, "tokenizer": None} | fields)


@pytest.mark.parametrize("field, value", [("label_smoothing", 1.0), ("mixup", -1.0), ("cutmix", -0.5)])
def test_refuses(field, value):
    with pytest.raises(ConfigError, match=f"task.{field} is {value}"):
        replace(CLASSIFY, **{field: value})


class Variants(chex.TestCase):
    """The whole loss with jit, without, and under pmap."""

    def check(self):
        loss = self.variant(lambda p, batch, rng: CLASSIFY.loss(p, {}, batch, rng)[0], n_devices=2)
        np.testing.assert_allclose(loss(params(CLASSIFY), labelled(), jax.random.key(0)), numpy_loss(), rtol=1e-4)

    @chex.variants(with_jit=True, with_pmap=True)
    def test_loss(self):
        self.check()


@pytest.mark.long
class Eager(Variants):
    """Without jit, one operation after the other."""

    @chex.variants(without_jit=True)
    def test_loss(self):
        self.check()
