"""Where the weights of transformers' BLIP classes lie: a picture encoder, and text transformers in BERT's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP as CLIP_PIXELS
from jaxmm.nn.pixels import Pixels
from jaxmm.pretrained import layers
from jaxmm.pretrained.checkpoint import Checkpoint
from jaxmm.pretrained.families.transformers import (
    STACK,
    patches,
    read_preprocessor,
    stack,
    write_preprocessor,
    write_stack,
)
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, norm
from jaxmm.pretrained.table import Row, lead
from jaxmm.pretrained.tokenizer import Words

PARTS = {"attention": "attention", "cross_attention": "crossattention"}

VISION = STACK | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "image_size": 384, "patch_size": 16}
TEXT = STACK | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 30_524, "max_position_embeddings": 512,
                "encoder_hidden_size": 768, "bos_token_id": 30_522, "sep_token_id": 102, "pad_token_id": 0}
"""The class's defaults in transformers, but for the number of heads: 8 there, 12 in every model that was released."""
IGNORED = (r"\.position_ids$", r"\.predictions\.decoder\.(weight|bias)$")
"""Buffers, and second names of what is stored elsewhere."""


def read_transformers(config: Mapping[str, Any], tensors: Tensors, preprocessor: Mapping[str, Any] | None
                      ) -> Checkpoint:
    """Understands a folder of transformers' BLIP classes: those that write captions, that match and that answer."""
    vision, text = VISION | config.get("vision_config", {}), TEXT | config.get("text_config", {})
    encoder, decoder = halves(tensors)
    if not encoder and not decoder:
        raise FileError("this BLIP has neither text_encoder nor text_decoder; supported are those that write captions, "
                        "that match and that answer questions")
    picture = ViTConfig(transformer=stack(vision), image_size=vision["image_size"], patch=vision["patch_size"])
    words = MedConfig(
        transformer=replace(stack(text), init="normal"), vocab_size=text["vocab_size"],
        positions=text["max_position_embeddings"], context_width=text["encoder_hidden_size"], encoder=encoder,
        decoder=not encoder, pad_id=text["pad_token_id"], end_id=text["sep_token_id"], decode_id=text["bos_token_id"],
        encode_id=text["bos_token_id"] + 1)
    matching = encoder and not decoder
    model = BLIPConfig(vision=picture, text=words, matching=matching, temperature=None,
                       answer=answering(words, tensors) if encoder and decoder else None,
                       embed_dim=tensors["vision_proj.weight"].shape[0] if matching else None)
    notes = []
    if "num_attention_heads" not in config.get("text_config", {}):
        notes.append("text_config.num_attention_heads is left out: 12 are used, with which every released model was "
                     "trained; transformers takes 8")
    if vision["layer_norm_eps"] == 1e-5:
        notes.append("vision_config.layer_norm_eps is 1e-5, as the file says and transformers computes; the authors "
                     "trained with 1e-6")
    if encoder:
        notes.append("[ENC] begins what is read with a picture, as in training; transformers keeps [CLS] "
                     "(encode_token=False)")
    default = {"size": picture.image_size, "resample": 3}
    image, pixels, told = read_preprocessor(preprocessor, picture, CLIP_PIXELS, default)
    return Checkpoint(family="transformers", config=model, rows=transformers_rows(model), image=image, pixels=pixels,
                      words=Words(vocabulary="bert"), ignore=IGNORED, notes=(*notes, *told))


def halves(tensors: Tensors) -> tuple[bool, bool]:
    """Whether there is a text encoder, and a text decoder."""
    encoder, decoder = (any(key.startswith(f"text_{part}.") for key in tensors) for part in ("encoder", "decoder"))
    return encoder, decoder


def answering(text: MedConfig, tensors: Tensors) -> MedConfig:
    """The decoder of answers beside the question encoder `text`: the same, but for what it sees."""
    key = tensors["text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"]
    return replace(text, encoder=False, decoder=True, context_width=key.shape[1])


def write_transformers(config: BLIPConfig, image: ImageConfig, pixels: Pixels
                       ) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:
    """`config.json`, `preprocessor_config.json` and the rows of a folder that transformers loads.

    Raises `FileError` where it has no class that does only that.
    """
    text, answer = config.text, config.answer
    if text.encoder == text.decoder or config.pair or config.temperature is not None or (
            answer is not None and (config.matching or config.embed_dim)):
        raise FileError("transformers has no such BLIP: it has classes that only write captions, that only match, and "
                        "that only answer, without a temperature")
    if answer is not None and replace(text, encoder=False, decoder=True) != answer:
        raise FileError("transformers has no such BLIP: text and answer differ, and it has one configuration for both")
    if text.encode_id != text.decode_id + 1:
        raise FileError(f"transformers has no such BLIP: text.encode_id = {text.encode_id}")
    name = "QuestionAnswering" if answer else "ImageTextRetrieval" if text.encoder else "ConditionalGeneration"
    described = {
        "model_type": "blip", "image_text_hidden_size": config.embed_dim or 256,
        "architectures": [f"BlipFor{name}"],
        "vision_config": write_stack(config.vision.transformer) | {
            "model_type": "blip_vision_model", "image_size": config.vision.image_size,
            "patch_size": config.vision.patch},
        "text_config": write_stack(text.transformer) | {
            "model_type": "blip_text_model", "vocab_size": text.vocab_size, "encoder_hidden_size": text.context_width,
            "max_position_embeddings": text.positions, "bos_token_id": text.decode_id, "sep_token_id": text.end_id,
            "eos_token_id": text.end_id, "pad_token_id": text.pad_id}}
    return described, write_preprocessor(image, pixels, "blip"), transformers_rows(config)


def transformers_rows(config: BLIPConfig) -> list[Row]:
    """transformers' `BlipForConditionalGeneration`, `BlipForImageTextRetrieval`, `BlipForQuestionAnswering`."""
    vision = "vision_model"
    block = {"attention": ("self_attn.qkv.weight", "self_attn.qkv.bias"), "out_name": "self_attn.projection",
             "mlp": ("mlp.fc1", "mlp.fc2"), "norms": ("layer_norm1", "layer_norm2")}
    rows = [
        *patches(f"{vision}.embeddings.patch_embedding", True, "vision/"),
        Row("vision/class_token", f"{vision}.embeddings.class_embedding", lead(2)),
        Row("vision/positions", f"{vision}.embeddings.position_embedding", lead(1)),
        *layers.layers("vision/encoder", f"{vision}.encoder.layers.{{}}", **block),
        *norm("vision/norm", f"{vision}.post_layernorm")]
    return rows + text_rows(config) + head_rows(config)


def head_rows(config: BLIPConfig) -> list[Row]:
    """Projections into the shared space, and the head that matches."""
    rows = []
    if config.embed_dim:
        rows += dense("vision_projection", "vision_proj") + dense("text_projection", "text_proj")
    if config.matching:
        rows += dense("matching_head", "itm_head")
    return rows


def text_rows(config: BLIPConfig) -> list[Row]:
    """All text transformers."""
    rows = []
    if config.text.encoder:
        rows += encoder_rows("text", "text_encoder")
    if config.text.decoder:
        rows += decoder_rows("text", config.text)
    if config.answer is not None:
        rows += decoder_rows("answer", config.answer)
    return rows


def encoder_rows(ours: str, theirs: str) -> list[Row]:
    """Embeddings and layers that encode."""
    rows = embedding_rows(ours, f"{theirs}.embeddings")
    for part in (*PARTS, "mlp"):
        rows += part_rows(f"{ours}/blocks/{part}", f"{theirs}.encoder.layer.{{}}", part)
    return rows


def decoder_rows(ours: str, config: MedConfig, theirs: str = "text_decoder") -> list[Row]:
    """Layers that decode and the head; where there is an encoder too, only what is the decoder's own."""
    rows = [] if config.encoder else embedding_rows(ours, f"{theirs}.bert.embeddings")
    for part in (*PARTS, "mlp"):
        if not config.encoder or part in config.own:
            name = f"causal_{part}" if config.encoder else part
            rows += part_rows(f"{ours}/blocks/{name}", f"{theirs}.bert.encoder.layer.{{}}", part)
    head = f"{theirs}.cls.predictions"
    return [*rows, *dense(f"{ours}/head/transform", f"{head}.transform.dense"),
            *norm(f"{ours}/head/norm", f"{head}.transform.LayerNorm"), Row(f"{ours}/head/bias", f"{head}.bias")]


def embedding_rows(ours: str, theirs: str) -> list[Row]:
    """Tables of tokens and places, and their norm."""
    return [Row(f"{ours}/embedding/tokens/embedding", f"{theirs}.word_embeddings.weight"),
            Row(f"{ours}/embedding/positions", f"{theirs}.position_embeddings.weight"),
            *norm(f"{ours}/embedding/norm", f"{theirs}.LayerNorm")]


def part_rows(ours: str, theirs: str, part: str) -> list[Row]:
    """One branch of every layer, and the norm behind it."""
    if part == "mlp":
        return [*dense(f"{ours}/up", f"{theirs}.intermediate.dense"), *dense(f"{ours}/down", f"{theirs}.output.dense"),
                *norm(f"{ours}_norm", f"{theirs}.output.LayerNorm")]
    name = f"{theirs}.{PARTS[part]}"
    return [*layers.projections(ours, {each: f"{name}.self.{each}" for each in layers.PARTS}),
            *layers.out(ours, f"{name}.output.dense"), *norm(f"{ours}_norm", f"{name}.output.LayerNorm")]
