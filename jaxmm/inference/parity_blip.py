"""BLIP's part of `parity`: what each mode computes, layer by layer, and the words that are written."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmm.inference.generate import Decoding, generate
from jaxmm.losses.language_modeling import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med import Med
from jaxmm.models.med_config import MedConfig
from jaxmm.models.med_layer import MedLayer
from jaxmm.models.vit import ViT
from jaxmm.nn.attention import causal_mask
from jaxmm.nn.pixels import CLIP_PIXELS
from jaxmm.tasks.blip_common import blip_decoder

LENGTH, GIVEN, WRITTEN = 16, 4, 20
"""Tokens of a golden text, those of them that begin a caption that is written, and how many are written."""
SMOOTHING = 0.1
SEARCHES = {"ids, greedy": 1, "ids, 3 beams": 3}


def golden_tokens(config: BLIPConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """Token ids [count t], the first text ending in the middle; of a model that answers, questions and answers side
    by side [count 2t].

    Questions have no padding: of transformers 5.23 the decoder of answers looks at tokens of the question that
    `encoder_attention_mask` should hide, and ours does not.
    """
    text = config.text
    below, length = min(text.decode_id, text.vocab_size), min(LENGTH, text.positions)
    tokens = rng.integers(2, below, (count, length if config.answer is None else 2 * length)).astype(np.int32)
    tokens[np.isin(tokens, (text.pad_id, text.end_id))] = 1
    tokens[:, length - 1] = tokens[1:, -1] = text.end_id
    half = length // 2
    tokens[0, -half:] = text.pad_id
    tokens[0, -half - 1] = text.end_id
    return tokens


def _sides(tokens: Any) -> tuple[Any, Any]:
    """Questions and answers [b t] of what is side by side."""
    half = tokens.shape[1] // 2
    return tokens[:, :half], tokens[:, half:]


def ours(config: BLIPConfig, params: Any, pictures: np.ndarray, tokens: np.ndarray) -> dict[str, jax.Array]:
    """Everything that the parts of `config` compute, in order."""
    module, text, pictures, tokens = BLIP(config), config.text, jnp.asarray(pictures), jnp.asarray(tokens)
    picture = jax.jit(lambda p, x: ViT(config.vision).apply({"params": p}, x, train=False, hidden=True))(
        params["vision"], pictures)
    seen = picture.tokens
    found = _named("vision", picture.hidden) | {"picture tokens": seen}
    if config.answer is not None:
        question, tokens = _sides(tokens)
        found |= _named("question", _grounded(config, params, question, seen))
        seen = jax.jit(lambda p, x: module.apply(
            {"params": p}, question, x, train=False, method=BLIP.encode_text_with_image))(params, seen)
        found["question states"] = seen
    elif text.encoder:
        both = (tokens != text.pad_id)[:, None, None, :]
        out = jax.jit(lambda p: module.apply({"params": p}, pictures, tokens, train=False))(params)
        found |= _named("text", _layers(text, params["text"], tokens, both, None, MedLayer.encode))
        if config.embed_dim:
            found |= {"image embedding": out.image, "text embedding": out.text,
                      "similarities": out.image @ out.text.T}
        found |= _named("matching", _grounded(config, params, tokens, seen))
        if config.matching:
            found["matching logits"] = out.match_logits
    if text.decoder or config.answer is not None:
        found |= _writing(config, params, tokens, seen)
    return found


def _grounded(config: BLIPConfig, params: Any, tokens, seen) -> jax.Array:
    """Texts after each layer of the image-grounded encoder [l b t d]."""
    text, both = config.text, (tokens != config.text.pad_id)[:, None, None, :]
    first = tokens.at[:, 0].set(text.encode_id) if config.encode_token else tokens
    return _layers(text, params["text"], first, both, seen, MedLayer.encode)


def _writing(config: BLIPConfig, params: Any, tokens, seen) -> dict[str, jax.Array]:
    """What the decoder makes of given texts and their loss, and the texts that it writes itself."""
    module, name = BLIP(config), "text" if config.answer is None else "answer"
    text = getattr(config, name)
    there = tokens != text.pad_id
    mask = causal_mask(tokens.shape[1]) & there[:, None, None, :]
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens, seen, train=False, method=BLIP.decode))(params)
    return (_named("writing", _layers(text, params[name], tokens, mask, seen, MedLayer.decode))
            | {"token logits": logits, "loss": language_loss(logits, tokens, there, SMOOTHING)}
            | {name: _written(config, params, seen, tokens, beams) for name, beams in SEARCHES.items()})


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

    return run(params)


def _written(config: BLIPConfig, params: Any, seen, tokens, beams: int) -> jax.Array:
    """The best texts [b L]: captions that go on from the first tokens, or answers."""
    given, count = GIVEN if config.answer is None else 1, len(tokens)
    decoding = Decoding(beams=beams, max_length=_longest(given, config.text.positions))
    keys = jax.random.split(jax.random.key(0), count)
    lengths = jnp.full(count, given)
    decoder = blip_decoder(config, CLIP_PIXELS)
    return jax.jit(lambda p: generate(decoder, p, seen, tokens[:, :given], lengths, keys, decoding).tokens)(
        params)[:, 0]


def _longest(given: int, positions: int) -> int:
    return min(given + WRITTEN, positions)


def _named(part: str, layers: Iterable[Any]) -> dict[str, Any]:
    return {f"{part} layer {i + 1}": layer for i, layer in enumerate(layers)}


def theirs(model: Any, pictures: Any, tokens: Any) -> dict[str, Any]:
    """The same of transformers' classes that write captions, that match and that answer; [ENC] is given where they
    keep [CLS]."""
    picture = model.vision_model(pictures, output_hidden_states=True)
    seen = picture.last_hidden_state
    found = _named("vision", picture.hidden_states[1:-1]) | {"picture tokens": seen}
    if not hasattr(model, "text_decoder"):
        return found | _matched(model, pictures, tokens, seen)
    given, inputs = GIVEN, {"input_ids": tokens[:, :GIVEN + 1].clone()}      # of which the last token is taken off
    if hasattr(model, "text_encoder"):
        question, tokens = _sides(tokens)
        first, read = _read(model, question, seen)
        seen, given, inputs = read.last_hidden_state, 1, {"input_ids": first}
        found |= _named("question", read.hidden_states[1:]) | {"question states": seen}
    text, decoder = model.config.text_config, model.text_decoder
    decoder.label_smoothing = SMOOTHING
    there = tokens != text.pad_token_id
    out = decoder(tokens, attention_mask=there.long(), encoder_hidden_states=seen,
                  labels=tokens.masked_fill(~there, -100), output_hidden_states=True)
    found |= _named("writing", out.hidden_states[1:]) | {"token logits": out.logits, "loss": out.loss}
    length = _longest(given, text.max_position_embeddings)
    for name, beams in SEARCHES.items():
        ids = model.generate(pixel_values=pictures, **inputs, max_length=length, num_beams=beams, do_sample=False)
        found[name] = np.pad(ids.numpy(), ((0, 0), (0, length - ids.shape[1])), constant_values=text.pad_token_id)
    return found


def _matched(model: Any, pictures: Any, tokens: Any, seen: Any) -> dict[str, Any]:
    """What texts are by themselves and with pictures, and whether they belong together."""
    there = (tokens != model.config.text_config.pad_token_id).long()
    alone = model.text_encoder(tokens, attention_mask=there, output_hidden_states=True)
    image, words = (x / x.norm(dim=-1, keepdim=True) for x in (
        model.vision_proj(seen[:, 0]), model.text_proj(alone.last_hidden_state[:, 0])))
    first, read = _read(model, tokens, seen)
    return _named("text", alone.hidden_states[1:]) | {
        "image embedding": image, "text embedding": words,
        "similarities": model(tokens, pictures, attention_mask=there, use_itm_head=False).itm_score,
        **_named("matching", read.hidden_states[1:]),
        "matching logits": model(first, pictures, attention_mask=there).itm_score}


def _read(model: Any, tokens: Any, seen: Any) -> tuple[Any, Any]:
    """Texts that begin with [ENC], and what the image-grounded encoder makes of them."""
    text, first = model.config.text_config, tokens.clone()
    first[:, 0] = text.bos_token_id + 1
    return first, model.text_encoder(first, attention_mask=(tokens != text.pad_token_id).long(),
                                     encoder_hidden_states=seen, output_hidden_states=True)
