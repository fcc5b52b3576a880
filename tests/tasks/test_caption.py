"""Captioning against plain numpy: the prompt is given, what is behind it is learned."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.tasks.blip_common import with_vocabulary
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.validation import ConfigError
from tests import reference
from tests.models.test_blip import MED, MODEL
from tests.pretrained.tiny import TOKENIZER
from tests.reference import fp64, log_softmax, random_like

WRITES = replace(MODEL, text=replace(MED, encoder=False), embed_dim=None, matching=False, temperature=None)
TASK = Captioning(model=WRITES, prompt_ids=(5, 9), smoothing=0.1)


def test_loss():
    params = random_like(jax.eval_shape(TASK.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tokens = np.array([[2, 7, 8, 3, 0, 0], [2, 4, 3, 0, 0, 0], [2, 11, 12, 13, 14, 3], [2, 3, 0, 0, 0, 0]], np.int32)
    image = rng.integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)      # the last caption is empty: only its end counts
    loss, (extra, metrics) = jax.jit(TASK.loss)(params, {}, {"image": jnp.asarray(image),
                                                            "tokens": jnp.asarray(tokens)}, jax.random.key(0))
    p = fp64(params)
    pixels = (image / 255 - np.array(TASK.pixels.mean)) / np.array(TASK.pixels.std)
    seen = reference.vit(p["vision"], pixels, WRITES.vision)[0]
    each, right = [], []
    for row, text in enumerate(tokens):
        whole = [MED.decode_id, 5, 9, *[token for token in text[1:].tolist() if token != 0]]
        states = reference.med(p["text"], np.array([whole]), WRITES.text, seen[row:row + 1], causal=True)
        told = log_softmax(reference.language_head(p["text"], states, WRITES.text)[0], 1)
        for place in range(3, len(whole)):
            each.append(-0.9 * told[place - 1, whole[place]] - 0.1 * told[place - 1].mean())
            right.append(told[place - 1].argmax() == whole[place])
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    assert extra == {}


def test_several_captions_of_an_image():
    """The mean of the losses with one caption each, which differ in length."""
    params = random_like(jax.eval_shape(TASK.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (4, 6, 6, 3)), jnp.uint8)
    tokens = jnp.asarray(rng.integers(4, 15, (4, 3, 6)), jnp.int32).at[1, 0, 3:].set(0).at[:, 2, 4:].set(0)
    run = jax.jit(TASK.loss)
    each = [run(params, {}, {"image": image, "tokens": tokens[:, i]}, jax.random.key(0)) for i in range(3)]
    loss, (_, metrics) = run(params, {}, {"image": image, "tokens": tokens}, jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean([value for value, _ in each]), rtol=1e-6)
    counted = np.array([(tokens[:, i] != 0).sum() - 4 for i in range(3)])
    right = np.array([found["accuracy"] for _, (_, found) in each]) * counted
    np.testing.assert_allclose(metrics["accuracy"], right.sum() / counted.sum(), rtol=1e-6)


def test_bind_takes_the_prompt_and_the_vocabulary_from_the_tokenizer():
    model = replace(WRITES, text=replace(WRITES.text, positions=30, vocab_size=None))
    task = replace(TASK, model=model, prompt="a red circle", prompt_ids=None).bind(
        image_size=6, classes=None, tokenizer=TOKENIZER)
    ids = TOKENIZER(["a red circle"])[0].tolist()
    assert task.prompt_ids == tuple(ids[1:ids.index(TOKENIZER.eos_id)])
    size = TOKENIZER.vocab_size
    text = task.model.text
    assert (text.vocab_size, text.decode_id, text.encode_id, text.end_id) == (size + 2, size, size + 1,
                                                                           TOKENIZER.eos_id)
    kept = replace(WRITES.text, vocab_size=size + 50, decode_id=size + 30, encode_id=size + 31)
    assert with_vocabulary(kept, TOKENIZER).decode_id == size + 30
    for narrow in (replace(kept, vocab_size=size + 31), replace(kept, decode_id=size - 1)):
        with pytest.raises(ConfigError, match=rf"vocab_size is {narrow.vocab_size}; expected None: .* {size} tokens"):
            with_vocabulary(narrow, TOKENIZER)
    for tokenizer, message in ((None, "has no texts"), (TOKENIZER, r"at most task\.model\.text\.positions = 9")):
        with pytest.raises(ConfigError, match=message):
            replace(TASK, model=replace(WRITES, text=replace(WRITES.text, vocab_size=None))).bind(
                image_size=6, classes=None, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"task\.model\.text\.decoder is False"):
        replace(TASK, model=replace(MODEL, text=replace(MED, decoder=False)))
