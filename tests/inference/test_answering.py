"""Ranking against every candidate scored alone, all at once, by the decoder's own logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.inference.answering import candidate_tokens, rank
from jaxmm.models.blip import BLIP
from jaxmm.nn.pixels import CLIP_PIXELS
from jaxmm.tasks.blip_common import blip_decoder
from jaxmm.validation import ConfigError
from tests import reference
from tests.models.test_blip import MED, MODEL
from tests.pretrained.tiny import CAPTIONER, TOKENIZER
from tests.reference import arrays, fp64, log_softmax, random_like
from tests.tasks.test_vqa import ANSWERS

WRITES = replace(MODEL, text=replace(MED, encoder=False), embed_dim=None, matching=False, temperature=None)
B, N = 3, 5
MASK = jnp.asarray([[True] * 5, [True, True, False, False, False], [True, True, True, True, False]])
CANDIDATES = jnp.asarray([[2, 5, 3, 0, 0], [2, 6, 7, 3, 0], [2, 5, 9, 8, 3], [2, 3, 0, 0, 0], [2, 12, 3, 0, 0],
                          [2, 6, 3, 0, 0], [2, 7, 14, 3, 0]], jnp.int32)


@pytest.fixture(scope="module", params=["answers", "captions"])
def model(request):
    config, width = (ANSWERS, 12) if request.param == "answers" else (WRITES, 10)
    params = random_like(jax.eval_shape(lambda key: BLIP(config).init(
        key, jnp.zeros((1, 6, 6, 3)), jnp.ones((1, 2), jnp.int32), train=False)["params"], jax.random.key(0)))
    return config, params, arrays((B, N, width), seed=4)[0]


def scores(config, params, context, candidates, mask, given, smoothing=0.0):
    """[b m], one candidate after the other in numpy, without padding."""
    name = "text" if config.answer is None else "answer"
    text, p = getattr(config, name), fp64(params[name])
    found = np.zeros((len(context), len(candidates)))
    for row, column in np.ndindex(*found.shape):
        there = slice(None) if mask is None else np.flatnonzero(np.asarray(mask[row]))
        tokens = [text.decode_id, *(token for token in np.asarray(candidates[column])[1:].tolist() if token)]
        states = reference.med(p, np.array([tokens]), text, np.asarray(context, np.float64)[row:row + 1, there],
                               causal=True)
        told = log_softmax(reference.language_head(p, states, text)[0], 1)
        found[row, column] = sum((1 - smoothing) * told[place - 1, tokens[place]] + smoothing * told[place - 1].mean()
                                 for place in range(given, len(tokens)))
    return found


def run(model, candidates=CANDIDATES, mask=MASK, **options):
    config, params, context = model
    return jax.jit(lambda params, context, candidates: rank(
        blip_decoder(config, CLIP_PIXELS), params, context, candidates, mask, **options))(params, context, candidates)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_candidates(model, smoothing):
    want = scores(*model, CANDIDATES, MASK, 1, smoothing)
    got = run(model, top=7, smoothing=smoothing)
    np.testing.assert_array_equal(got.index, np.argsort(-want, axis=1))
    np.testing.assert_allclose(got.score, -np.sort(-want, axis=1), rtol=1e-4)
    assert run(model, top=99).index.shape == (B, 7)


def test_what_else_is_there_does_not_matter(model, monkeypatch):
    whole = run(model, top=7)
    config, params, context = model
    order = np.array([3, 6, 0, 5, 1, 4, 2])
    shuffled = run(model, CANDIDATES[order], top=7)
    np.testing.assert_array_equal(order[shuffled.index], whole.index)
    longer = jnp.pad(CANDIDATES, ((0, 0), (0, 2)))
    wider = jnp.pad(context, ((0, 0), (0, 3), (0, 0)), constant_values=9.0), jnp.pad(MASK, ((0, 0), (0, 3)))
    alone = rank(blip_decoder(config, CLIP_PIXELS), params, context[1:2], CANDIDATES, MASK[1:2], top=7)
    # three at a time, of seven
    monkeypatch.setattr("jaxmm.inference.answering.LOGITS_AT_ONCE", 3 * B * 7 * MED.vocab_size)
    for each in (run(model, longer, top=7), run((config, params, wider[0]), mask=wider[1], top=7), shuffled):
        np.testing.assert_allclose(each.score, whole.score, rtol=1e-4)
    np.testing.assert_allclose(alone.score[0], whole.score[1], rtol=1e-4)
    np.testing.assert_array_equal(alone.index[0], whole.index[1])


def test_shortlist(model):
    want = scores(*model, CANDIDATES, MASK, 1)
    firsts = scores(*model, CANDIDATES[:, :2], MASK, 1)
    got = run(model, shortlist=3, top=2)
    for row in range(B):
        kept = np.argsort(-firsts[row], kind="stable")[:3]      # among equals the first
        best = kept[np.argsort(-want[row, kept])][:2]
        np.testing.assert_array_equal(got.index[row], best)
        np.testing.assert_allclose(got.score[row], want[row, best], rtol=1e-4)
    np.testing.assert_array_equal(run(model, shortlist=7, top=7).index, run(model, top=7).index)


def test_what_is_given_is_not_scored(model):
    candidates = jnp.concatenate([jnp.full((7, 1), 2), jnp.full((7, 1), 11), CANDIDATES[:, 1:]], axis=1)
    want, firsts = scores(*model, candidates, None, 2), scores(*model, candidates[:, :3], None, 2)
    for shortlist in (7, 4):
        got = run(model, candidates, None, given=2, shortlist=shortlist, top=2)
        for row in range(B):
            kept = np.argsort(-firsts[row], kind="stable")[:shortlist]
            best = kept[np.argsort(-want[row, kept])][:2]
            np.testing.assert_array_equal(got.index[row], best)
            np.testing.assert_allclose(got.score[row], want[row, best], rtol=1e-4)


def test_candidate_tokens():
    tokens, given = candidate_tokens(TOKENIZER, ["red", "a small circle", "[SEP]", ""], CAPTIONER.decoder, "a large")
    start = [CAPTIONER.model.text.decode_id, *TOKENIZER(["a large"])[0, 1:3]]
    assert given == 3 and tokens[:, :3].tolist() == [start] * 4
    for row, text in zip(tokens, ["red", "a small circle", "[SEP]", ""], strict=True):
        whole = TOKENIZER.at_length(30)([text])[0, 1:]
        np.testing.assert_array_equal(row[3:], whole[:tokens.shape[1] - 3])
        assert (whole[tokens.shape[1] - 3:] == 0).all() and (row[3:] == TOKENIZER.eos_id).sum() == 1
    longest, _ = candidate_tokens(TOKENIZER, ["red " * 50], CAPTIONER.decoder)
    assert longest.shape == (1, CAPTIONER.model.text.positions) and longest[0, -1] == TOKENIZER.eos_id
    for nothing in ([], "red"):
        with pytest.raises(ConfigError, match="expected a list of one text or more"):
            candidate_tokens(TOKENIZER, nothing, CAPTIONER.decoder)
    short = replace(CAPTIONER.decoder, longest=4)
    with pytest.raises(ConfigError, match="prompt is 'a small red'; expected at most 1 tokens"):
        candidate_tokens(TOKENIZER, ["a"], short, "a small red")
