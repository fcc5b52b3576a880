"""Both objectives of iGPT, their gradients and one optimizer step, against numpy; fine-tuning; what a run binds."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.inference.batching import predictions
from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.palette import Palette
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.saved_config import from_dict, to_dict
from jaxmm.sharding import named_leaves
from jaxmm.task import capabilities
from jaxmm.tasks.generative_classification import GenerativeClassification
from jaxmm.tasks.generative_pretraining import GenerativePretraining
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import fp64
from tests.tasks.common import CLASSIFY

B, SIDE, COLORS, CLASSES = 8, 4, 6, 5
RNG = np.random.default_rng(0)
PALETTE = Palette(colors=tuple(map(tuple, RNG.uniform(-1, 1, (COLORS, 3)).tolist())))
MODEL = IGPTConfig(transformer=TransformerConfig(width=12, depth=2, heads=3, mlp_dim=20, eps=1e-4,
                                                 activation="quick_gelu", init="igpt"), image_size=SIDE, colors=COLORS)
PRETRAIN = GenerativePretraining(model=MODEL, palette=PALETTE)
BERT = replace(PRETRAIN, kind="bert", hide=0.3)
FINETUNE = GenerativeClassification(model=replace(MODEL, classes=CLASSES), palette=PALETTE, generative_weight=0.7)
BATCH = {"image": jnp.asarray(RNG.integers(0, 256, (B, SIDE, SIDE, 3)), jnp.uint8),
         "label": jnp.asarray(RNG.integers(0, CLASSES, B), jnp.int32)}
KEY = jax.random.key(4)


@cache
def params(task):
    return reference.random_like(jax.eval_shape(task.init, jax.random.key(0)))


def numpy_tokens():
    pixels = np.asarray(BATCH["image"]).reshape(B, -1, 1, 3) / 127.5 - 1
    return np.square(pixels - np.array(PALETTE.colors)).sum(axis=-1).argmin(axis=-1)


def numpy_pixel_loss(parameters, task):
    """The loss of each image, by the paper's sums."""
    tokens, hidden = numpy_tokens(), None
    if task.kind == "bert":
        drawing = jax.random.split(KEY)[1]
        hidden = np.asarray(jax.random.bernoulli(drawing, task.hide, tokens.shape))
        assert 0 < hidden.sum() < hidden.size and hidden.any(axis=1).all()
    given = tokens if hidden is not None else np.concatenate([np.full((B, 1), COLORS), tokens[:, :-1]], axis=1)
    logits, _, classes = reference.igpt(parameters, given, task.model, hidden, task.kind != "bert")
    losses = -np.take_along_axis(reference.log_softmax(logits, 2), tokens[..., None], axis=2)[..., 0]
    if hidden is None:
        return losses.mean(axis=1), classes
    return np.array([row[where].mean() for row, where in zip(losses, hidden, strict=True)]), classes


def numpy_loss(parameters, task):
    losses, classes = numpy_pixel_loss(parameters, task)
    if isinstance(task, GenerativePretraining):
        return losses.mean()
    right = np.take_along_axis(reference.log_softmax(classes, 1), np.asarray(BATCH["label"])[:, None], axis=1)
    return task.generative_weight * losses.mean() - right.mean()


@cache
def compiled(task):
    return jax.jit(jax.value_and_grad(lambda p: task.loss(p, {}, BATCH, KEY), has_aux=True))


@pytest.mark.parametrize("task", [PRETRAIN, BERT, FINETUNE], ids=["autoregressive", "bert", "fine-tuning"])
def test_loss_gradient_and_one_step(task):
    """The gradient along random directions is the difference of numpy's losses; SGD's step lowers numpy's loss by it.
    """
    start = params(task)
    (loss, (extra, metrics)), grads = compiled(task)(start)
    assert extra == {}
    np.testing.assert_allclose(loss, numpy_loss(fp64(start), task), rtol=1e-5)
    wide = fp64(start)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape), start)
        ends = [numpy_loss(jax.tree.map(lambda p, d, sign=sign: p + sign * 1e-5 * d, wide, direction), task)
                for sign in (1, -1)]
        slope = sum(float((np.asarray(g, np.float64) * d).sum()) for g, d in zip(
            jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-4)
    updates, _ = optax.sgd(1e-3).update(grads, optax.sgd(1e-3).init(start))
    after = numpy_loss(fp64(optax.apply_updates(start, updates)), task)
    norm = sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(numpy_loss(wide, task) - after, 1e-3 * norm, rtol=0.05)
    if task is FINETUNE:
        losses, classes = numpy_pixel_loss(fp64(start), task)
        np.testing.assert_allclose(metrics["generative_loss"], losses.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (classes.argmax(axis=1) == np.asarray(BATCH["label"])).mean())


def test_a_batch_is_the_mean_of_its_parts():
    for task in (PRETRAIN, FINETUNE):
        assert task.decomposes and task.splits
    halves = [jax.jit(lambda p, batch: PRETRAIN.loss(p, {}, batch, KEY)[0])(
        params(PRETRAIN), {"image": BATCH["image"][part]}) for part in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(np.mean(halves), compiled(PRETRAIN)(params(PRETRAIN))[0][0], rtol=1e-6)


def test_features_and_logits():
    for task in (PRETRAIN, BERT, FINETUNE):
        tokens = numpy_tokens()
        causal = task.kind != "bert"
        given = np.concatenate([np.full((B, 1), COLORS), tokens[:, :-1]], axis=1) if causal else tokens
        _, layers, classes = reference.igpt(fp64(params(task)), given, task.model, None, causal)
        predicted = {name: jax.jit(f)(params(task), BATCH) for name, f in predictions(task).items()}
        np.testing.assert_allclose(predicted["layers"], layers, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(predicted["features"], predicted["layers"][:, 1])
        if task is FINETUNE:
            np.testing.assert_allclose(predicted["logits"], classes, rtol=1e-3, atol=1e-4)
    first = replace(PRETRAIN, feature_layer=0)
    np.testing.assert_array_equal(jax.jit(first.embedder.image)(params(first), BATCH),
                                  jax.jit(first.embedder.layers)(params(first), BATCH)[:, 0])


def test_the_decoder_is_the_model():
    decoder, tokens = PRETRAIN.decoder, numpy_tokens()
    given = np.concatenate([np.full((B, 1), COLORS), tokens[:, :-1]], axis=1)
    np.testing.assert_array_equal(jax.jit(decoder.to_tokens)(BATCH["image"]), tokens)
    logits = jax.jit(lambda p, t: decoder.logits(p, t, None, None))(params(PRETRAIN), given)
    np.testing.assert_allclose(logits, reference.igpt(fp64(params(PRETRAIN)), given, MODEL)[0], rtol=1e-3, atol=1e-4)
    assert (decoder.start_id, decoder.longest, decoder.vocab_size) == (COLORS, SIDE**2 + 1, COLORS)
    assert capabilities(PRETRAIN) == ("embeds images", "embeds images in every layer", "generates images")
    assert BERT.decoder is None and capabilities(BERT) == capabilities(PRETRAIN)[:2]
    assert "classifies images" in capabilities(FINETUNE) and "generates images" in capabilities(FINETUNE)


def test_bind_and_fit():
    recipe = GenerativePretraining(model=MODEL)
    bound = recipe.bind(image_size=SIDE, classes=None, tokenizer=None)
    fitted = bound.fit(lambda count: np.asarray(BATCH["image"]))
    assert len(fitted.palette.colors) == COLORS and fitted.fit(None) is fitted
    assert from_dict(to_dict(fitted)) == fitted and hash(fitted) == hash(from_dict(to_dict(fitted)))
    classifier = GenerativeClassification(model=MODEL).bind(image_size=SIDE, classes=3, tokenizer=None)
    assert classifier.model.classes == 3 and classifier.classes == 3


def test_fine_tuning_adopts_architecture_and_palette():
    recipe = GenerativeClassification(model=replace(MODEL, colors=2, transformer=replace(
        MODEL.transformer, width=24, depth=1, remat="full")))
    adopted = recipe.adopt(PRETRAIN, SIDE)
    assert adopted.palette == PALETTE
    assert adopted.model == replace(MODEL, transformer=replace(MODEL.transformer, remat="full"))
    adopted = adopted.bind(image_size=SIDE, classes=CLASSES, tokenizer=None)
    paths = {path: adopted.trained_path(path, PRETRAIN) for path, _ in named_leaves(params(FINETUNE))}
    assert paths.pop("class_head/kernel") is None and all(paths[path] == path for path in paths)
    assert set(paths) == {path for path, _ in named_leaves(params(PRETRAIN))}
    assert recipe.adopt(CLASSIFY, SIDE) is None


@pytest.mark.parametrize("call, words", [
    (lambda: PRETRAIN.bind(image_size=5, classes=None, tokenizer=None),
     "data.image.size is 5; expected the model's task.model.image_size = 4"),
    (lambda: replace(PRETRAIN, model=replace(MODEL, colors=7)).bind(image_size=SIDE, classes=None, tokenizer=None),
     "task.palette is '6 colours'; expected task.model.colors = 7"),
    (lambda: FINETUNE.bind(image_size=SIDE, classes=None, tokenizer=None), "data.train has no labels"),
    (lambda: FINETUNE.bind(image_size=SIDE, classes=4, tokenizer=None), "classes is 5; expected None, or the source's"),
    (lambda: replace(PRETRAIN, hide=0.0), "task.hide is 0.0"), (lambda: replace(FINETUNE, hide=1.0), "task.hide"),
    (lambda: replace(PRETRAIN, feature_layer=2), "task.feature_layer is 2; expected 0 to 1, or None"),
    (lambda: replace(PRETRAIN, model=FINETUNE.model), "task.model.classes is 5"),
    (lambda: replace(FINETUNE, generative_weight=-1.0), "task.generative_weight"),
    (lambda: replace(PRETRAIN, palette=None).decoder.to_tokens(BATCH["image"]), "task.palette is None")])
def test_refuses(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
