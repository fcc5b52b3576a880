"""What is written, against plain searches in numpy over every continuation."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.inference.generate import Decoding, cache_lengths, generate, search
from jaxmm.task import Decoder
from jaxmm.validation import ConfigError

VOCABULARY, END, PAD = 6, 1, 0
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(4, VOCABULARY, VOCABULARY, VOCABULARY)).astype(np.float32) * 2
"""Logits by picture, last token and the one before it: what follows depends on what the cache must keep."""


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def step(pictures, beams):
    """A decoder whose cache is the tokens so far."""
    rows = jnp.repeat(jnp.asarray(pictures), beams)

    def run(tokens, at, cache, held):
        cache = cache.at[:, at].set(tokens)
        assert held.shape == cache.shape
        before = jnp.where(at > 0, cache[jnp.arange(len(tokens)), jnp.maximum(at - 1, 0)], 0)
        return jnp.asarray(TABLE)[rows, tokens, before], cache

    return run


def logits(picture, text):
    return TABLE[picture, text[-1], text[-2] if len(text) > 1 else 0]


def written(pictures, prompts, decoding, keys=None):
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    prompt = np.full((len(prompts), max(lengths)), PAD, np.int32)
    for row, text in zip(prompt, prompts, strict=True):
        row[:len(text)] = text

    def cache(length):
        return jnp.zeros((len(prompts) * decoding.beams, length), jnp.int32)

    keys = jax.random.split(jax.random.key(0), len(prompts)) if keys is None else keys
    found = jax.jit(lambda prompt, lengths, keys: search(
        step(pictures, decoding.beams), cache, prompt, lengths, keys, decoding, end_id=END, pad_id=PAD))(
        jnp.asarray(prompt), jnp.asarray(lengths), keys)
    return np.asarray(found.tokens), np.asarray(found.score)


def told(text, length):
    return [*text, *[PAD] * (length - len(text))]


def adjusted(scores, text, decoding):
    scores = scores.copy()
    for token in set(text) if decoding.repetition_penalty != 1 else ():
        scores[token] = scores[token] * decoding.repetition_penalty if scores[token] < 0 else (
            scores[token] / decoding.repetition_penalty)
    if len(text) < decoding.min_length:
        scores[END] = -1e9
    return scores


@pytest.mark.parametrize("options", [{}, {"min_length": 5}, {"repetition_penalty": 1.7}, {"max_length": 3}],
                         ids=str)
def test_greedy(options):
    decoding = Decoding(**{"max_length": 8} | options)
    prompts = [[2], [3, 4], [2, 5, 3], [4]]
    tokens, score = written(range(4), prompts, decoding)
    for picture, prompt in enumerate(prompts):
        text, total = list(prompt), 0.0
        while len(text) < decoding.max_length and (len(text) == len(prompt) or text[-1] != END):
            scores = adjusted(logits(picture, text), text, decoding)
            total += log_softmax(scores)[scores.argmax()]
            text.append(int(scores.argmax()))
        assert tokens[picture, 0].tolist() == told(text, decoding.max_length)
        if len(text) > len(prompt):
            np.testing.assert_allclose(score[picture, 0], total / (len(text) - len(prompt)), rtol=1e-5)


def beam_search(picture, prompt, decoding):
    """As published (BLIP's authors' and transformers'): 2k candidates, those that end among the first k are kept."""
    running, ended, k = [(0.0, list(prompt))], [], decoding.beams
    while True:
        candidates = []
        for score, text in running:
            scores = adjusted(log_softmax(logits(picture, text)), text, decoding)
            candidates += [(score + scores[token], [*text, token]) for token in range(VOCABULARY)]
        candidates = sorted(candidates, key=lambda each: -each[0])[:2 * k]
        place = len(candidates[0][1])
        length = (place - len(prompt)) ** decoding.length_penalty
        last = place == decoding.max_length
        ended += [(score / length, text) for score, text in candidates[:k] if text[-1] == END or last]
        ended = sorted(ended, key=lambda each: -each[0])[:k]
        running = [each for each in candidates if each[1][-1] != END][:k]
        if last or (len(ended) == k and ended[-1][0] >= running[0][0] / length):
            return ended


@pytest.mark.parametrize("options", [
    {}, {"length_penalty": 0.0}, {"length_penalty": 2.0}, {"min_length": 5}, {"repetition_penalty": 1.5}, {"beams": 2},
    {"beams": 5}, {"beams": VOCABULARY + 3}], ids=str)
def test_beams(options):
    decoding = Decoding(**{"max_length": 8, "beams": 3} | options)
    prompts = [[2], [3, 4], [2, 5, 3], [4]]
    tokens, score = written(range(4), prompts, decoding)
    for picture, prompt in enumerate(prompts):
        want = beam_search(picture, prompt, decoding)
        np.testing.assert_allclose(score[picture], [each for each, _ in want], rtol=1e-4)
        assert tokens[picture].tolist() == [told(text, 8) for _, text in want]


def test_beams_that_all_end_at_once(monkeypatch):
    """The end is all but certain behind every token: the best text is it alone, the others are one token longer."""
    table = np.full_like(TABLE, -20.0) + TABLE
    table[..., END] = 5
    monkeypatch.setitem(globals(), "TABLE", table)
    decoding, prompts = Decoding(beams=3, max_length=8), [[2], [3, 4], [2, 5, 3], [4]]
    tokens, score = written(range(4), prompts, decoding)
    for picture, prompt in enumerate(prompts):
        want = beam_search(picture, prompt, decoding)
        np.testing.assert_allclose(score[picture], [each for each, _ in want], rtol=1e-4, atol=1e-6)
        assert tokens[picture].tolist() == [told(text, 8) for _, text in want]
        assert tokens[picture, 0].tolist() == told([*prompt, END], 8)
        assert [row.tolist().index(END) for row in tokens[picture]] == [len(prompt) + i for i in (0, 1, 1)]
    assert np.isfinite(score).all() and (np.diff(score, axis=1) <= 0).all()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_no_room_behind_the_prompt(beams, length):
    """Nothing is written: the best is the prompt, cut where it is too long, with the score of no token at all."""
    prompts = [[2, 5, 3], [3, 4, 4], [2, 2, 2], [4, 5, 5]]
    tokens, score = written(range(4), prompts, Decoding(beams=beams, max_length=length))
    assert tokens[:, 0].tolist() == [prompt[:length] for prompt in prompts]
    assert (score[:, 0] == 0).all() and np.isfinite(score).all() and (score[:, 1:] < -1e8).all()


def test_more_beams_than_texts():
    """Six texts can be written; what fills the other beams loses to them all."""
    decoding = Decoding(beams=VOCABULARY + 3, max_length=2)
    tokens, score = written([1], [[2]], decoding)
    order = np.argsort(-logits(1, [2]))
    assert tokens[0, :VOCABULARY].tolist() == [[2, token] for token in order]
    np.testing.assert_allclose(score[0, :VOCABULARY], log_softmax(logits(1, [2]))[order], rtol=1e-5)
    assert np.isfinite(score).all() and (score[0, VOCABULARY:] < -1e8).all()


def test_wide_beams_find_the_best_of_all_texts():
    decoding = Decoding(beams=VOCABULARY**3, max_length=4, length_penalty=1.0)
    tokens, score = written([1], [[2]], decoding)
    best = []
    for length in (1, 2, 3):
        for text in itertools.product(range(VOCABULARY), repeat=length):
            if END in text[:-1] or (length < 3 and text[-1] != END):
                continue
            whole, total = [2], 0.0
            for token in text:
                total += log_softmax(logits(1, whole))[token]
                whole.append(token)
            best.append((total / length, whole))
    best.sort(key=lambda each: -each[0])
    np.testing.assert_allclose(score[0, :20], [each for each, _ in best[:20]], rtol=1e-4)
    assert tokens[0, 0].tolist() == told(best[0][1], 4)


@pytest.mark.parametrize("options", [{"beams": 3}, {}, {"sample": True}], ids=str)
@pytest.mark.parametrize("longest", [8, 9, 10])
def test_growing_cache(options, longest, monkeypatch):
    """The same text whether the cache has all positions from the start or grows with the sequences."""
    decoding, prompts = Decoding(max_length=longest, min_length=7, **options), [[2], [3, 4, 4, 2, 5], [2, 5, 3], [4]]
    want = written(range(4), prompts, decoding)
    monkeypatch.setattr("jaxmm.inference.generate.SEGMENT", 4)
    assert cache_lengths(longest)[0] == 4 and cache_lengths(longest)[-1] == longest
    for got, expected in zip(written(range(4), prompts, decoding), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("options", [{"beams": 3}, {}, {"sample": True, "top_p": 0.9}], ids=str)
def test_a_text_does_not_depend_on_its_company(options):
    decoding = Decoding(max_length=7, **options)
    prompts, keys = [[2], [3, 4, 5], [2, 5], [4]], jax.random.split(jax.random.key(3), 4)
    together = written(range(4), prompts, decoding, keys)
    for i in range(4):
        alone = written([i], prompts[i:i + 1], decoding, keys[i:i + 1])
        assert (alone[0][0] == together[0][i]).all()
        np.testing.assert_allclose(alone[1][0], together[1][i], rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}, {"temperature": 0.5}, {"top_p": 0.7, "top_k": 4}],
                         ids=str)
def test_samples_are_drawn_from_what_is_left(options):
    decoding = Decoding(sample=True, max_length=2, **options)
    count = 4000
    tokens, _ = written([2] * count, [[3]] * count, decoding)
    shares = np.bincount(tokens[:, 0, 1], minlength=VOCABULARY) / count
    chances = np.exp(log_softmax(logits(2, [3]) / decoding.temperature))
    order = np.argsort(-chances)
    kept = chances.copy()
    if decoding.top_k:
        kept[order[decoding.top_k:]] = 0
        kept /= kept.sum()
    if decoding.top_p < 1:
        needed = 1 + int((np.cumsum(kept[order]) < decoding.top_p).sum())
        kept[order[needed:]] = 0
    kept /= kept.sum()
    assert ((shares > 0) == (kept > 0.001)).all() or (shares[kept == 0] == 0).all()
    np.testing.assert_allclose(shares, kept, atol=4 * np.sqrt(0.25 / count))


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"sample": True, "top_k": 4}], ids=str)
def test_a_decoder_without_end_padding_and_context(options):
    """Pixels: every row has its full length, token ids of END and PAD mean nothing, prompts are a part of the image."""
    decoder = Decoder(
        context=None, cache=lambda rows, length: jnp.zeros((rows, length), jnp.int32), start_id=2, end_id=None,
        pad_id=None, longest=9, vocab_size=VOCABULARY, logits=lambda *args: None,
        decode_step=lambda params, tokens, position, cache, prepared, cache_mask, context_mask: step(
            [0] * 3, options.get("beams", 1))(tokens, position, cache, cache_mask))
    prompt, decoding = jnp.asarray([[4, PAD, END], [4, END, END], [5, 3, 3]]), Decoding(max_length=9, **options)
    generated = jax.jit(lambda prompt, keys: generate(decoder, {}, None, prompt, jnp.asarray([3, 3, 1]), keys,
                                                      decoding))(prompt, jax.random.split(jax.random.key(1), 3))
    tokens = np.asarray(generated.tokens[:, 0])
    assert (tokens[:, 0] == 2).all() and tokens[:2, 1:3].tolist() == [[PAD, END], [END, END]]
    for row, length in zip(tokens, (3, 3, 1), strict=True):
        if not options:
            assert all(row[i] == logits(0, row[:i].tolist()).argmax() for i in range(length, 9))
    total = [sum(log_softmax(logits(0, row[:i].tolist()))[row[i]] for i in range(length, 9)) / (9 - length)
             for row, length in zip(tokens, (3, 3, 1), strict=True)]
    np.testing.assert_allclose(generated.score[:, 0], total, rtol=1e-4)
    assert (tokens[:, 3:] == END).any()


@pytest.mark.parametrize("options", [{}, {"sample": True, "top_p": 0.9, "top_k": 4}, {"beams": 3}], ids=str)
def test_logits_that_allow_no_token(options, monkeypatch):
    """NaN, -inf for all, and for all but the end, which comes too early: the search ends, and no other row changes."""
    decoding = Decoding(max_length=8, min_length=5, **options)
    prompts, keys = [[2], [3, 4], [2, 5, 3, 4, 2], [4, 2]], jax.random.split(jax.random.key(3), 4)
    want, scores = written(range(4), prompts, decoding, keys)
    table = TABLE.copy()
    table[1], table[2:], table[3, ..., END] = np.nan, -np.inf, 0.0
    monkeypatch.setitem(globals(), "TABLE", table)
    tokens, score = written(range(4), prompts, decoding, keys)
    assert (tokens[0] == want[0]).all() and (score[0] == scores[0]).all() and np.isfinite(score[0]).all()
    assert np.isnan(score[1]).all() and not (score[2] > -1e8).any() and ((tokens >= 0) & (tokens < VOCABULARY)).all()
    assert tokens[3, 0, :2].tolist() == [4, 2] and set(tokens[3, 0, 2:].tolist()) <= {END, PAD}


def test_values_that_make_no_sense():
    for options, message in (({"beams": 0}, "decoding.beams is 0"), ({"top_p": 0.0}, "decoding.top_p is 0.0"),
                             ({"sample": True, "beams": 2}, "decoding.sample"), ({"top_k": 3}, "decoding.sample"),
                             ({"temperature": 0.0}, "decoding.temperature")):
        with pytest.raises(ConfigError, match=message):
            Decoding(**options)
    assert replace(Decoding(), beams=3).beams == 3
