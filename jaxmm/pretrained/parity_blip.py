"""BLIP's part of `parity`: what each mode computes, layer by layer, and the words that are written."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.generate import Decoding
from jaxmm.losses.language import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig, write_texts
from jaxmm.models.med import Med, MedConfig, MedLayer
from jaxmm.models.vit import ViT
from jaxmm.nn.attention import causal_mask

LENGTH, GIVEN, WRITTEN = 16, 4, 20
"""Tokens of a golden text, those of them that begin what is written, and how many are written."""
SMOOTHING = 0.1
SEARCHES = {"ids, greedy": 1, "ids, 3 beams": 3}


def golden_tokens(config: BLIPConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """Token ids [count t], the first text ending in the middle."""
    text = config.text
    below, length = min(text.decode_id, text.vocab_size), min(LENGTH, text.positions)
    tokens = rng.integers(2, below, (count, length)).astype(np.int32)
    tokens[np.isin(tokens, (text.pad_id, text.end_id))] = 1
    half = tokens.shape[1] // 2
    tokens[0, half:] = text.pad_id
    tokens[0, half - 1] = tokens[1:, -1] = text.end_id
    return tokens


def ours(config: BLIPConfig, params: Any, pictures: np.ndarray, tokens: np.ndarray) -> dict[str, jax.Array]:
    """Everything that the parts of `config` compute, in order."""
    module, text, pictures, tokens = BLIP(config), config.text, jnp.asarray(pictures), jnp.asarray(tokens)
    picture = jax.jit(lambda p, x: ViT(config.vision).apply({"params": p}, x, train=False, hidden=True))(
        params["vision"], pictures)
    there, seen = tokens != text.pad_id, picture.tokens
    found = _named("vision", picture.hidden) | {"picture tokens": seen}
    if text.encoder:
        both = there[:, None, None, :]
        out = jax.jit(lambda p: module.apply({"params": p}, pictures, tokens, train=False))(params)
        found |= _named("text", _layers(text, params, tokens, both, None, MedLayer.encode))
        if config.embed_dim:
            found |= {"image embedding": out["image"], "text embedding": out["text"],
                      "similarities": out["image"] @ out["text"].T}
        first = tokens.at[:, 0].set(text.encode_id) if config.encode_token else tokens
        found |= _named("matching", _layers(text, params, first, both, seen, MedLayer.encode))
        if config.matching:
            found["matching logits"] = out["match"]
    if text.decoder:
        mask = causal_mask(tokens.shape[1]) & there[:, None, None, :]
        found |= _named("writing", _layers(text, params, tokens, mask, seen, MedLayer.decode))
        logits = jax.jit(lambda p: module.apply({"params": p}, tokens, seen, train=False, method=BLIP.write))(params)
        found |= {"token logits": logits, "loss": language_loss(logits, tokens, there, SMOOTHING)}
        found |= {name: _written(config, params, seen, tokens, beams) for name, beams in SEARCHES.items()}
    return found


def _layers(config: MedConfig, params: Any, tokens, mask, context, method) -> jax.Array:
    """Tokens after each layer of the text transformer [l b t d]."""
    layer = MedLayer(config, parent=None)

    @jax.jit
    def run(params):
        x = Med(config).apply({"params": params}, tokens, method=lambda med, ids: med.embedding(ids, train=False))

        def one(x, params):
            x, _ = layer.apply({"params": params}, x, mask, context, None, train=False, method=method)
            return x, x

        return jax.lax.scan(one, x, params["blocks"])[1]

    return run(params["text"])


def _written(config: BLIPConfig, params: Any, seen, tokens, beams: int) -> jax.Array:
    """The best texts [b L] that go on from the first tokens."""
    decoding, count = Decoding(beams=beams, max_length=_longest(config.text.positions)), len(tokens)
    keys = jax.random.split(jax.random.key(0), count)
    lengths = jnp.full(count, GIVEN)
    return jax.jit(lambda p: write_texts(config, p, seen, tokens[:, :GIVEN], lengths, keys, decoding).tokens)(
        params)[:, 0]


def _longest(positions: int) -> int:
    return min(GIVEN + WRITTEN, positions)


def _named(part: str, layers: Iterable[Any]) -> dict[str, Any]:
    return {f"{part} layer {i + 1}": layer for i, layer in enumerate(layers)}


def theirs(model: Any, pictures: Any, tokens: Any) -> dict[str, Any]:
    """The same of transformers' classes that write captions and that match; [ENC] is given where they keep [CLS]."""
    text = model.config.text_config
    there = (tokens != text.pad_token_id).long()
    picture = model.vision_model(pictures, output_hidden_states=True)
    seen = picture.last_hidden_state
    found = _named("vision", picture.hidden_states[1:-1]) | {"picture tokens": seen}
    if hasattr(model, "text_encoder"):
        alone = model.text_encoder(tokens, attention_mask=there, output_hidden_states=True)
        image, words = (x / x.norm(dim=-1, keepdim=True) for x in (
            model.vision_proj(seen[:, 0]), model.text_proj(alone.last_hidden_state[:, 0])))
        first = tokens.clone()
        first[:, 0] = text.bos_token_id + 1
        read = model.text_encoder(first, attention_mask=there, encoder_hidden_states=seen, output_hidden_states=True)
        return found | _named("text", alone.hidden_states[1:]) | {
            "image embedding": image, "text embedding": words,
            "similarities": model(tokens, pictures, attention_mask=there, use_itm_head=False).itm_score,
            **_named("matching", read.hidden_states[1:]),
            "matching logits": model(first, pictures, attention_mask=there).itm_score}
    decoder = model.text_decoder
    decoder.label_smoothing = SMOOTHING
    states = decoder.bert(tokens, attention_mask=there, encoder_hidden_states=seen, is_decoder=True,
                          output_hidden_states=True).hidden_states
    out = model(pixel_values=pictures, input_ids=tokens, attention_mask=there,
                labels=tokens.masked_fill(there == 0, -100))
    found |= _named("writing", states[1:]) | {"token logits": out.logits, "loss": out.loss}
    length = _longest(text.max_position_embeddings)
    for name, beams in SEARCHES.items():      # the last token of a prompt is taken off
        ids = model.generate(pixel_values=pictures, input_ids=tokens[:, :GIVEN + 1].clone(), max_length=length,
                             num_beams=beams, do_sample=False)
        found[name] = np.pad(ids.numpy(), ((0, 0), (0, length - ids.shape[1])), constant_values=text.pad_token_id)
    return found
