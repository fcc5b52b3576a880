"""Answering against plain numpy: every answer by itself, with its weight."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.task import Task
from jaxmm.tasks.question_answering import QuestionAnswering
from jaxmm.validation import ConfigError
from tests import reference
from tests.models.test_blip import MED, MODEL
from tests.pretrained.tiny import TOKENIZER
from tests.reference import fp64, log_softmax, random_like

ANSWERS = replace(MODEL, text=replace(MED, decoder=False), embed_dim=None, matching=False, temperature=None,
                  answer=replace(MED, encoder=False, context_width=12, positions=7))
TASK = QuestionAnswering(model=ANSWERS, smoothing=0.1)
RNG = np.random.default_rng(0)
BATCH = {"image": jnp.asarray(RNG.integers(0, 256, (4, 6, 6, 3)), jnp.uint8),
         "tokens": jnp.asarray([[2, 7, 8, 3, 0, 0], [2, 4, 3, 0, 0, 0], [2, 11, 12, 13, 14, 3], [2, 5, 3, 0, 0, 0]],
                               jnp.int32),
         "answers": jnp.asarray([[[2, 5, 3, 0, 0], [2, 6, 7, 3, 0], [0, 0, 0, 0, 0]],
                                 [[2, 9, 9, 9, 3], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
                                 [[2, 5, 3, 0, 0], [2, 8, 3, 0, 0], [2, 6, 4, 3, 0]],
                                 [[2, 7, 3, 0, 0], [2, 4, 3, 0, 0], [0, 0, 0, 0, 0]]], jnp.int32),
         "answer_weight": jnp.asarray([[0.7, 0.3, 0], [1, 0, 0], [0.5, 0.3, 0.2], [0.9, 0.1, 0]], jnp.float32)}


@pytest.fixture(scope="module")
def params():
    return random_like(jax.eval_shape(TASK.init, jax.random.key(0)))


def test_loss(params):
    outputs = jax.jit(TASK.encode)(params, BATCH, jax.random.key(0))
    p, want, right = fp64(params), np.zeros(4), []
    pixels = (np.asarray(BATCH["image"]) / 255 - np.array(TASK.pixels.mean)) / np.array(TASK.pixels.std)
    seen = reference.vit(p["vision"], pixels, ANSWERS.vision)[0]
    for i in range(4):
        question = np.array([[MED.encode_id, *(token for token in BATCH["tokens"][i, 1:].tolist() if token)]])
        states = reference.med(p["text"], question, ANSWERS.text, seen[i:i + 1])
        for answer, weight in zip(np.asarray(BATCH["answers"][i]), np.asarray(BATCH["answer_weight"][i]), strict=True):
            if weight:
                whole = [MED.decode_id, *(token for token in answer[1:].tolist() if token)]
                x = reference.med(p["answer"], np.array([whole]), ANSWERS.answer, states, causal=True)
                told = log_softmax(reference.language_head(p["answer"], x, ANSWERS.answer)[0], 1)
                want[i] -= weight * sum(0.9 * told[place, token] + 0.1 * told[place].mean()
                                        for place, token in enumerate(whole[1:]))
                right += [told[place].argmax() == token for place, token in enumerate(whole[1:])]
    np.testing.assert_allclose(outputs["loss"], want, rtol=1e-5)
    loss, metrics = TASK.objective(params, outputs, BATCH)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    assert TASK.decomposes and QuestionAnswering.loss is Task.loss


def test_several_questions_of_a_picture(params):
    """As if its picture stood in the batch as often as it is asked about."""
    both = BATCH | {"image": BATCH["image"][:2]} | {
        name: BATCH[name].reshape(2, 2, *BATCH[name].shape[1:]) for name in ("tokens", "answers", "answer_weight")}
    got = jax.jit(TASK.encode)(params, both, jax.random.key(0))
    want = jax.jit(TASK.encode)(params, BATCH | {"image": jnp.repeat(BATCH["image"][:2], 2, axis=0)}, jax.random.key(0))
    np.testing.assert_allclose(got["loss"], want["loss"].reshape(2, 2).mean(axis=1), rtol=1e-5)
    for name in ("correct", "total"):
        np.testing.assert_array_equal(got[name], want[name].reshape(2, 2).sum(axis=1))


def test_bind():
    model = replace(ANSWERS, text=replace(ANSWERS.text, positions=30, vocab_size=None),
                    answer=replace(ANSWERS.answer, vocab_size=None))
    task = replace(TASK, model=model).bind(image_size=6, classes=None, tokenizer=TOKENIZER)
    size = TOKENIZER.vocab_size
    for part in (task.model.text, task.model.answer):
        assert (part.vocab_size, part.decode_id, part.encode_id, part.end_id) == (size + 2, size, size + 1,
                                                                               TOKENIZER.eos_id)
    for tokenizer, message in ((None, "has no texts"),
                               (TOKENIZER.at_length(10), r"at most task\.model\.text\.positions = 9")):
        with pytest.raises(ConfigError, match=message):
            TASK.bind(image_size=6, classes=None, tokenizer=tokenizer)
    long = BATCH | {"answers": jnp.ones((4, 3, 8), jnp.int32)}
    with pytest.raises(ConfigError, match=r"answer_length is 8; expected at most task\.model\.answer\.positions = 7"):
        jax.eval_shape(TASK.loss, jax.eval_shape(TASK.init, jax.random.key(0)), {}, long, jax.random.key(0))
    with pytest.raises(ConfigError, match=r"task\.model\.answer is None"):
        QuestionAnswering(model=replace(ANSWERS, answer=None))
    with pytest.raises(ConfigError, match=r"task\.model\.text\.decoder is True"):
        QuestionAnswering(model=replace(ANSWERS, text=MED))
