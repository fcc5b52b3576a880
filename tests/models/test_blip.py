"""BLIP and its text transformer against plain numpy, mode by mode; and one token at a time against all at once."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.models.blip import BLIP, BLIPConfig, blip
from jaxmm.models.med import Med
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig, empty_cache
from jaxmm.sharding import named_leaves
from jaxmm.validation import ConfigError
from tests import reference
from tests.reference import fp64, random_like

STACK = TransformerConfig(width=12, depth=3, heads=3, mlp_dim=20, eps=1e-4)
MED = MedConfig(transformer=STACK, vocab_size=17, positions=9, context_width=10, end_id=3, decode_id=15, encode_id=16)
VISION = ViTConfig(transformer=replace(STACK, width=10, heads=2), image_size=6, patch=3)
MODEL = BLIPConfig(vision=VISION, text=MED, embed_dim=8)
B, T = 3, 6
RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.normal(size=(B, 6, 6, 3)), jnp.float32)
TOKENS = RNG.integers(1, 15, (B, T))
TOKENS[1, 4:] = 0
TOKENS = jnp.asarray(TOKENS, jnp.int32)
SHARING = {"all but self-attention": ("attention",), "all but cross-attention": ("cross_attention",), "everything": (),
           "nothing": ("attention", "cross_attention", "mlp")}


PAIR = replace(MODEL, text=replace(MED, decoder=False, merge_from=2), embed_dim=None, matching=False, temperature=None)
PICTURES = jnp.stack([IMAGE, IMAGE[::-1] * 0.7 + 0.1], axis=1)


def parameters(config, image=IMAGE):
    return random_like(jax.eval_shape(
        lambda key: BLIP(config).init(key, image, TOKENS, train=False)["params"], jax.random.key(0)))


def shared(name):
    config = replace(MODEL, text=replace(MED, own=SHARING[name]))
    return config, parameters(config)


@cache
def compiled(config, method, **kwargs):
    return jax.jit(lambda params, *args: BLIP(config).apply({"params": params}, *args, method=method, **kwargs))


def apply(config, params, *args, method, **kwargs):
    return compiled(config, method, **kwargs)(params, *args)


@cache
def gradients(config):
    """Of a sum that all outputs are in, compiled."""
    images = IMAGE if config.text.merge_from is None else PICTURES

    def total(params):
        out = BLIP(config).apply({"params": params}, images, TOKENS, train=True)
        return sum(jnp.sin(leaf).sum() for leaf in out if leaf is not None)

    return jax.tree.leaves(jax.jit(jax.grad(total))(parameters(config, images)))


def assert_same_gradients(config, change):
    other = replace(config, text=replace(config.text, transformer=replace(STACK, **change)))
    for one, two in zip(gradients(config), gradients(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", [
    "all but self-attention", "nothing", *(pytest.param(name, marks=pytest.mark.long) for name in (
        "all but cross-attention", "everything"))])
def test_every_mode(sharing):
    config, params = shared(sharing)
    p, image, tokens = fp64(params), np.asarray(IMAGE, np.float64), np.asarray(TOKENS)
    seen = reference.vit(p["vision"], image, config.vision)[0]
    got = apply(config, params, IMAGE, TOKENS, train=False, method=BLIP.__call__)
    w = p["vision_projection"]
    np.testing.assert_allclose(got.image, reference.unit(seen[:, 0] @ w["kernel"] + w["bias"]), atol=1e-5)
    w = p["text_projection"]
    text = reference.med(p["text"], tokens, config.text)[:, 0]
    np.testing.assert_allclose(got.text, reference.unit(text @ w["kernel"] + w["bias"]), atol=1e-5)
    first = tokens.copy()
    first[:, 0] = config.text.encode_id
    read = reference.med(p["text"], first, config.text, seen, keep=tokens != 0)
    w = p["matching_head"]
    np.testing.assert_allclose(got.match_logits, read[:, 0] @ w["kernel"] + w["bias"], rtol=1e-4, atol=1e-5)
    states = reference.med(p["text"], tokens, config.text, seen, causal=True)
    want = reference.language_head(p["text"], states, config.text)
    np.testing.assert_allclose(got.token_logits, want, rtol=1e-4, atol=1e-4)


def test_where_each_token_looks():
    params, image, first = parameters(MODEL), np.asarray(IMAGE, np.float64), TOKENS.at[:, 0].set(MED.encode_id)
    seen = reference.vit(fp64(params)["vision"], image, VISION)[0]
    for causal, tokens in ((True, TOKENS), (False, first)):
        want: list = []
        reference.med(fp64(params)["text"], np.asarray(tokens), MED, seen, causal=causal, shares=want)
        got = Med(MED).apply({"params": params["text"]}, tokens, jnp.asarray(seen, jnp.float32), causal=causal,
                             method=Med.cross_attention_weights)
        np.testing.assert_allclose(got, np.stack(want), atol=1e-6)


def test_texts_that_look_at_the_same_picture_in_turn():
    params = parameters(MODEL)
    seen = apply(MODEL, params, IMAGE, train=False, method=BLIP.encode_image)
    tokens = jnp.concatenate([TOKENS, TOKENS[::-1]])
    got = apply(MODEL, params, tokens, seen, train=False, method=BLIP.match)
    each = jnp.repeat(seen, 2, axis=0)
    np.testing.assert_allclose(got, apply(MODEL, params, tokens, each, train=False, method=BLIP.match), atol=1e-6)


@pytest.mark.parametrize("sharing", SHARING)
def test_what_is_shared_is_there_once(sharing):
    config, params = shared(sharing)
    blocks = {path.split("/")[0] for path, _ in named_leaves(params["text"]["blocks"])}
    own = config.text.own
    assert blocks == {name for part in ("attention", "cross_attention", "mlp") for each in (
        [part, f"causal_{part}"] if part in own else [part]) for name in (each, f"{each}_norm")}


@pytest.mark.parametrize("change, decoder, encoder", [
    ("attention", False, True), ("causal_attention", True, False), ("mlp", True, True),
    ("cross_attention", True, True)])
def test_each_mode_uses_its_own(change, decoder, encoder):
    params = parameters(MODEL)
    before = apply(MODEL, params, IMAGE, TOKENS, train=False, method=BLIP.__call__)
    params["text"]["blocks"][change] = jax.tree.map(lambda x: x * 1.1, params["text"]["blocks"][change])
    after = apply(MODEL, params, IMAGE, TOKENS, train=False, method=BLIP.__call__)
    assert (np.abs(after.token_logits - before.token_logits).max() > 1e-4) == decoder
    assert (np.abs(after.match_logits - before.match_logits).max() > 1e-4) == encoder
    assert (np.abs(after.text - before.text).max() > 1e-4) == (encoder and change != "cross_attention")


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("encoder", [True, False])
def test_step_by_step_is_all_at_once(beams, encoder):
    config = replace(MED, encoder=encoder, own=("attention", "mlp"))
    module = Med(config)
    context = jnp.asarray(RNG.normal(size=(B, 4, 10)), jnp.float32)
    context_mask = jnp.asarray([[True] * 4, [True, True, False, False], [True] * 3 + [False]])
    tokens = jnp.asarray(RNG.integers(1, 15, (B * beams, T)), jnp.int32)
    params = random_like(jax.eval_shape(
        lambda key: module.init(key, tokens, jnp.repeat(context, beams, 0), train=False, method=Med.decode),
        jax.random.key(0)))
    whole = module.apply(params, tokens, jnp.repeat(context, beams, 0), train=False, method=Med.decode,
                         context_mask=jnp.repeat(context_mask, beams, 0))
    sights = module.apply(params, context, method=Med.cross_attention_cache)
    cache = empty_cache(config.transformer, B * beams, 8)

    @jax.jit
    def step(tokens, at, cache):
        held = jnp.broadcast_to(jnp.arange(8) <= at, (B * beams, 8))
        return module.apply(params, tokens, at, cache, sights, held, context_mask, method=Med.decode_step)

    for at in range(T):
        logits, cache = step(tokens[:, at], jnp.asarray(at), cache)
        np.testing.assert_allclose(logits, whole[:, at], atol=1e-4)
    assert len(cache) == len(sights) == 3
    assert cache[0][0].shape == (B * beams, 3, 8, 4) and sights[0].keys_values[0].shape == (B, 3, 4, 4)


def test_padding_and_what_comes_later_are_not_seen():
    params = parameters(MODEL)
    seen = apply(MODEL, params, IMAGE, train=False, method=BLIP.encode_image)
    first = apply(MODEL, params, TOKENS, seen, train=False, method=BLIP.decode)
    changed = TOKENS.at[:, 3].set(7)
    np.testing.assert_allclose(apply(MODEL, params, changed, seen, train=False, method=BLIP.decode)[:, :3],
                               first[:, :3], atol=1e-6)
    longer = jnp.pad(TOKENS, ((0, 0), (0, 2)))
    for method in (BLIP.match, BLIP.decode):
        one, other = (apply(MODEL, params, tokens, seen, train=False, method=method) for tokens in (TOKENS, longer))
        np.testing.assert_allclose(other[:, :T] if method is BLIP.decode else other, one, atol=1e-5)


@pytest.mark.parametrize("change", [
    {"remat": "cheap"}, {"scan": False}, pytest.param({"remat": "full"}, marks=pytest.mark.long)], ids=str)
def test_how_it_is_computed_does_not_matter(change):
    assert_same_gradients(MODEL, change)


def test_published_sizes():
    config = blip("base", image_size=224)
    shapes = jax.eval_shape(lambda key: BLIP(config).init(
        key, jnp.zeros((1, 224, 224, 3)), jnp.ones((1, 5), jnp.int32), train=False)["params"], jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / 1e6 - 252) < 1      # the paper's table 3
    large = blip("large")
    assert (large.text.context_width, large.vision.transformer.drop_path) == (1024, 0.1)


def test_two_pictures_are_read_by_cross_attentions_of_their_own():
    params = parameters(PAIR, PICTURES)
    assert params["text"]["merge"]["kernel"].shape == (1, 24, 12)
    p, stack = fp64(params), MED.transformer
    first, second = (reference.vit(p["vision"], np.asarray(PICTURES[:, i], np.float64), VISION)[0] for i in (0, 1))
    tokens, text = np.asarray(TOKENS).copy(), p["text"]
    keep = np.broadcast_to((tokens != 0)[:, None, None], (B, 1, T, T))
    tokens[:, 0] = MED.encode_id
    x = text["embedding"]["tokens"]["embedding"][tokens] + text["embedding"]["positions"][:T]
    x = reference.norm(text["embedding"]["norm"], x, stack.eps)
    for number in range(3):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], text["blocks"])
        x = reference.norm(layer["attention_norm"], x + reference.attention(layer["attention"], x, x, keep)[0],
                           stack.eps)
        one = reference.attention(layer["first_cross_attention"], x, first)[0]
        two = reference.attention(layer["second_cross_attention"], x, second)[0]
        seen = (one + two) / 2
        if number == 2:
            kernel = text["merge"]["kernel"][0]
            seen = one @ kernel[:12] + two @ kernel[12:] + text["merge"]["bias"][0]
        x = reference.norm(layer["cross_attention_norm"], x + seen, stack.eps)
        x = reference.norm(layer["mlp_norm"], x + reference.mlp(layer["mlp"], x, "gelu"), stack.eps)
    hidden = np.maximum(x[:, 0] @ p["pair_hidden"]["kernel"] + p["pair_hidden"]["bias"], 0)
    want = hidden @ p["pair_head"]["kernel"] + p["pair_head"]["bias"]
    got = apply(PAIR, params, PICTURES, TOKENS, train=False, method=BLIP.__call__).pair_logits
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    turned = apply(PAIR, params, PICTURES[:, ::-1], TOKENS, train=False, method=BLIP.__call__).pair_logits
    assert np.abs(turned - got).max() > 1e-3
    for change in ({"scan": False}, {"remat": "cheap"}):
        assert_same_gradients(PAIR, change)


def test_attention_weights():
    """Handed out beside the outputs, which stay what they are."""
    params = parameters(MODEL)
    plain = apply(MODEL, params, IMAGE, TOKENS, train=False, method=BLIP.__call__)
    out = apply(MODEL, params, IMAGE, TOKENS, train=False, attention=True, method=BLIP.__call__)
    for one, other in zip(plain[:5], out[:5], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert plain[5:] == (None, None, None)
    want: list = []
    p, first = fp64(params), TOKENS.at[:, 0].set(MED.encode_id)
    image_tokens = reference.vit(p["vision"], np.asarray(IMAGE, np.float64), VISION)[0]
    for causal, tokens in ((False, first), (True, TOKENS)):
        reference.med(p["text"], np.asarray(tokens), MED, image_tokens, causal=causal, shares=want)
    np.testing.assert_allclose(jnp.concatenate([out.encoder_attention, out.decoder_attention]), np.stack(want),
                               atol=1e-5)
    np.testing.assert_allclose(out.image_attention.sum(axis=-1), np.ones((3, B, 2, 5)), rtol=1e-5)


def test_attention_weights_of_answers_and_pairs():
    answers = replace(MODEL, text=replace(MED, decoder=False), embed_dim=None, matching=False, temperature=None,
                      answer=replace(MED, encoder=False, context_width=12))
    for config, images, shapes in ((answers, IMAGE, ((3, B, 2, 5, 5), (3, B, 3, T, 5), (3, B, 3, T, T))),
                                   (PAIR, PICTURES, ((3, 2 * B, 2, 5, 5), None, None))):
        out = jax.eval_shape(lambda params, images=images, config=config: BLIP(config).apply(
            {"params": params}, images, TOKENS, train=False, attention=True), parameters(config, images))
        assert tuple(None if leaf is None else leaf.shape for leaf in out[5:]) == shapes


@pytest.mark.parametrize("build, message", [
    (lambda: replace(PAIR, matching=True), "text.merge_from is 2; expected None, for embed_dim, matching"),
    (lambda: replace(MED, merge_from=2), "text.decoder is True; expected False: with merge_from"),
    (lambda: replace(MED, decoder=False, merge_from=3), "text.merge_from is 3; expected 1 to 2"),
    (lambda: replace(MODEL, text=replace(MED, context_width=11)), "text.context_width is 11"),
    (lambda: replace(MODEL, answer=MED), "answer.context_width is 10; expected the question encoder's width = 12"),
    (lambda: replace(MED, encoder=False, decoder=False), "text.encoder is False"),
    (lambda: replace(MODEL, text=replace(MED, encoder=False)), "text.encoder is False"),
    (lambda: blip("huge"), "size is 'huge'; expected base or large"),
    (lambda: replace(MED, end_id=99), "text.end_id is 99")])
def test_what_does_not_fit(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
