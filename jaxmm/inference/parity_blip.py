"""Compute BLIP's modes layer by layer, and the texts it generates, in our model and in transformers (`parity`)."""

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

LENGTH, PROMPT, GENERATED = 16, 4, 20
"""Tokens of a golden text, of the prompt of a caption, and of the generated part."""
SMOOTHING = 0.1
SEARCHES = {"ids, greedy": 1, "ids, 3 beams": 3}


def golden_tokens(config: BLIPConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return token ids [count t]; for a model that answers, questions and answers side by side [count 2t].

    The first text ends in the middle. Questions have no padding: in transformers 5.23 the answer decoder attends to
    tokens of the question that `encoder_attention_mask` should hide, and ours does not.
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
    """Split questions and answers [b t] that lie side by side."""
    half = tokens.shape[1] // 2
    return tokens[:, :half], tokens[:, half:]


def ours(config: BLIPConfig, params: Any, images: np.ndarray, tokens: np.ndarray) -> dict[str, jax.Array]:
    """Return the results of all parts of `config`, in order."""
    module, text, images, tokens = BLIP(config), config.text, jnp.asarray(images), jnp.asarray(tokens)
    vision = jax.jit(lambda p, x: ViT(config.vision).apply({"params": p}, x, train=False, hidden=True))(
        params["vision"], images)
    context = vision.tokens
    outputs = named("vision", vision.hidden) | {"image tokens": context}
    if config.answer is not None:
        question, tokens = _sides(tokens)
        outputs |= named("question", _grounded(config, params, question, context))
        context = jax.jit(lambda p, x: module.apply(
            {"params": p}, question, x, train=False, method=BLIP.encode_text_with_image))(params, context)
        outputs["question states"] = context
    elif text.encoder:
        both = (tokens != text.pad_id)[:, None, None, :]
        out = jax.jit(lambda p: module.apply({"params": p}, images, tokens, train=False))(params)
        outputs |= named("text", _layers(text, params["text"], tokens, both, None, MedLayer.encode))
        if config.embed_dim:
            outputs |= {"image embedding": out.image, "text embedding": out.text,
                      "similarities": out.image @ out.text.T}
        outputs |= named("matching", _grounded(config, params, tokens, context))
        if config.matching:
            outputs["matching logits"] = out.match_logits
    if text.decoder or config.answer is not None:
        outputs |= _writing(config, params, tokens, context)
    return outputs


def _grounded(config: BLIPConfig, params: Any, tokens, context) -> jax.Array:
    """Return the tokens after each layer of the image-grounded encoder [l b t d]."""
    text, both = config.text, (tokens != config.text.pad_id)[:, None, None, :]
    first = tokens.at[:, 0].set(text.encode_id) if config.encode_token else tokens
    return _layers(text, params["text"], first, both, context, MedLayer.encode)


def _writing(config: BLIPConfig, params: Any, tokens, context) -> dict[str, jax.Array]:
    """Return the decoder's layers, logits and loss on given texts, and the texts that it generates."""
    module, name = BLIP(config), "text" if config.answer is None else "answer"
    text = getattr(config, name)
    real = tokens != text.pad_id
    mask = causal_mask(tokens.shape[1]) & real[:, None, None, :]
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens, context, train=False, method=BLIP.decode))(params)
    return (named("writing", _layers(text, params[name], tokens, mask, context, MedLayer.decode))
            | {"token logits": logits, "loss": language_loss(logits, tokens, real, SMOOTHING)}
            | {name: _written(config, params, context, tokens, beams) for name, beams in SEARCHES.items()})


def _layers(config: MedConfig, params: Any, tokens, mask, context, method) -> jax.Array:
    """Return the tokens after each layer of the text transformer [l b t d]."""
    layer = MedLayer(config, parent=None)

    @jax.jit
    def run(params):
        x = Med(config).apply({"params": params}, tokens, method=lambda med, ids: med.embedding(ids, train=False))

        def one(x, params):
            x, _ = layer.apply({"params": params}, x, mask, context, None, train=False, method=method)
            return x, x

        return jax.lax.scan(one, x, params["blocks"])[1]

    return run(params)


def _written(config: BLIPConfig, params: Any, context, tokens, beams: int) -> jax.Array:
    """Return the best texts [b L]: captions after the first tokens, or answers."""
    given, count = PROMPT if config.answer is None else 1, len(tokens)
    decoding = Decoding(beams=beams, max_length=_longest(given, config.text.positions))
    keys = jax.random.split(jax.random.key(0), count)
    lengths = jnp.full(count, given)
    decoder = blip_decoder(config, CLIP_PIXELS)
    return jax.jit(lambda p: generate(decoder, p, context, tokens[:, :given], lengths, keys, decoding).tokens)(
        params)[:, 0]


def _longest(given: int, positions: int) -> int:
    return min(given + GENERATED, positions)


def named(part: str, layers: Iterable[Any]) -> dict[str, Any]:
    """Return the results of the layers of `part` by name."""
    return {f"{part} layer {i + 1}": layer for i, layer in enumerate(layers)}


def theirs(model: Any, images: Any, tokens: Any) -> dict[str, Any]:
    """Return the same results of transformers' classes for captioning, matching and question answering.

    [ENC] is given where they keep [CLS].
    """
    vision = model.vision_model(images, output_hidden_states=True)
    context = vision.last_hidden_state
    outputs = named("vision", vision.hidden_states[1:-1]) | {"image tokens": context}
    if not hasattr(model, "text_decoder"):
        return outputs | _matched(model, images, tokens, context)
    given, inputs = PROMPT, {"input_ids": tokens[:, :PROMPT + 1].clone()}      # the last token is removed
    if hasattr(model, "text_encoder"):
        question, tokens = _sides(tokens)
        first, read = _read(model, question, context)
        context, given, inputs = read.last_hidden_state, 1, {"input_ids": first}
        outputs |= named("question", read.hidden_states[1:]) | {"question states": context}
    text, decoder = model.config.text_config, model.text_decoder
    decoder.label_smoothing = SMOOTHING
    real = tokens != text.pad_token_id
    out = decoder(tokens, attention_mask=real.long(), encoder_hidden_states=context,
                  labels=tokens.masked_fill(~real, -100), output_hidden_states=True)
    outputs |= named("writing", out.hidden_states[1:]) | {"token logits": out.logits, "loss": out.loss}
    length = _longest(given, text.max_position_embeddings)
    for name, beams in SEARCHES.items():
        ids = model.generate(pixel_values=images, **inputs, max_length=length, num_beams=beams, do_sample=False)
        outputs[name] = np.pad(ids.numpy(), ((0, 0), (0, length - ids.shape[1])), constant_values=text.pad_token_id)
    return outputs


def _matched(model: Any, images: Any, tokens: Any, context: Any) -> dict[str, Any]:
    """Return texts encoded alone and with images, embeddings, similarities and matching logits."""
    real = (tokens != model.config.text_config.pad_token_id).long()
    alone = model.text_encoder(tokens, attention_mask=real, output_hidden_states=True)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (
        model.vision_proj(context[:, 0]), model.text_proj(alone.last_hidden_state[:, 0])))
    first, read = _read(model, tokens, context)
    return named("text", alone.hidden_states[1:]) | {
        "image embedding": image, "text embedding": text,
        "similarities": model(tokens, images, attention_mask=real, use_itm_head=False).itm_score,
        **named("matching", read.hidden_states[1:]),
        "matching logits": model(first, images, attention_mask=real).itm_score}


def _read(model: Any, tokens: Any, context: Any) -> tuple[Any, Any]:
    """Return texts that begin with [ENC], and the output of the image-grounded encoder."""
    text, first = model.config.text_config, tokens.clone()
    first[:, 0] = text.bos_token_id + 1
    return first, model.text_encoder(first, attention_mask=(tokens != text.pad_token_id).long(),
                                     encoder_hidden_states=context, output_hidden_states=True)
