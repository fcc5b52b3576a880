"""transformers' BLIP classes: an image encoder, and text transformers in BERT's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP_PIXELS, Pixels
from jaxmm.pretrained import layers
from jaxmm.pretrained.families.image_processor import PREPROCESSOR, preprocessor, read_preprocessor, write_preprocessor
from jaxmm.pretrained.families.transformers import STACK, patches, stack, tower, write_stack
from jaxmm.pretrained.family import Checkpoint, Export, Family
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, norm
from jaxmm.pretrained.table import Row, lead
from jaxmm.pretrained.tokenizer import Vocabulary, bert_vocabulary
from jaxmm.task import Task
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.tasks.pair_classification import PairClassification
from jaxmm.tasks.question_answering import QuestionAnswering

PARTS = {"attention": "attention", "cross_attention": "crossattention"}

VISION = STACK | {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "image_size": 384, "patch_size": 16}
TEXT = STACK | {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 30_524, "max_position_embeddings": 512,
                "encoder_hidden_size": 768, "bos_token_id": 30_522, "sep_token_id": 102, "pad_token_id": 0}
"""Defaults of the class in transformers, except the number of heads: 8 there, 12 in every released model."""
IGNORED = (r"\.position_ids$", r"\.predictions\.decoder\.(weight|bias)$")
"""Keys of buffers, and of tensors that are stored under another name too."""
LENGTH = 40
"""Most tokens of a text in BLIP's fine-tuning for captions and matching."""
QUESTION_LENGTH = 35
"""Most tokens of a question, likewise."""


def read(config: Mapping[str, Any], tensors: Tensors, processor: Mapping[str, Any] | None) -> Checkpoint:
    """Describe a folder of transformers' BLIP classes for captioning, matching or question answering."""
    vision, text = tower(config, "vision", VISION), tower(config, "text", TEXT)
    encoder, decoder = halves(tensors)
    if not encoder and not decoder:
        raise FileError("this BLIP has neither text_encoder nor text_decoder; supported are the classes for "
                        "captioning, matching and question answering")
    image_tower = ViTConfig(transformer=stack(vision), image_size=vision["image_size"], patch=vision["patch_size"])
    text_tower = MedConfig(
        transformer=replace(stack(text), init="normal"), vocab_size=text["vocab_size"],
        positions=text["max_position_embeddings"], context_width=text["encoder_hidden_size"], encoder=encoder,
        decoder=not encoder, pad_id=text["pad_token_id"], end_id=text["sep_token_id"], decode_id=text["bos_token_id"],
        encode_id=text["bos_token_id"] + 1)
    matching = encoder and not decoder
    model = BLIPConfig(vision=image_tower, text=text_tower, matching=matching, temperature=None,
                       answer=answer_decoder(text_tower, tensors) if encoder and decoder else None,
                       embed_dim=tensors["vision_proj.weight"].shape[0] if matching else None)
    notes = []
    if "num_attention_heads" not in (config.get("text_config") or {}):
        notes.append("text_config.num_attention_heads is left out: 12 are used, with which every released model was "
                     "trained; transformers takes 8")
    if vision["layer_norm_eps"] == 1e-5:
        notes.append("vision_config.layer_norm_eps is 1e-5, as the file says and transformers computes; the authors "
                     "trained with 1e-6")
    if encoder:
        notes.append("texts that are read with an image begin with [ENC], as in training; transformers keeps [CLS] "
                     "(encode_token=False)")
    default = {"size": image_tower.image_size, "resample": 3}
    image, pixels, more = read_preprocessor(processor, image_tower, CLIP_PIXELS, default)
    return Checkpoint(task=blip_task(model, pixels), rows=transformers_rows(model), image=image,
                      vocabulary=vocabulary(model), ignore=IGNORED, notes=(*notes, *more))


def blip_task(model: BLIPConfig, pixels: Pixels) -> Task:
    """Return the objective that a published BLIP with these parts was trained with."""
    task = (PairClassification if model.pair else QuestionAnswering if model.answer else
            BLIPPretraining if model.text.encoder else Captioning)
    return task(model=model, pixels=pixels)


def vocabulary(model: BLIPConfig) -> Vocabulary:
    """Return BERT's vocabulary, with the context length of BLIP's fine-tuning."""
    return bert_vocabulary(min(model.text.positions, QUESTION_LENGTH if model.answer else LENGTH))


def halves(tensors: Tensors) -> tuple[bool, bool]:
    """Return whether there is a text encoder, and whether there is a text decoder."""
    encoder, decoder = (any(key.startswith(f"text_{part}.") for key in tensors) for part in ("encoder", "decoder"))
    return encoder, decoder


def answer_decoder(text: MedConfig, tensors: Tensors) -> MedConfig:
    """Return the configuration of the answer decoder: that of the question encoder `text`, with another context."""
    key = tensors["text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"]
    return replace(text, encoder=False, decoder=True, context_width=key.shape[1])


def write(task: Task, image: ImageConfig, labels: tuple[str, ...] | None, tokenizer: Tokenizer | None) -> Export:
    """Describe a folder that transformers loads. Raises `FileError` if no class there does exactly that."""
    config = task.model
    text, answer = config.text, config.answer
    if text.encoder == text.decoder or config.pair or config.temperature is not None or (
            answer is not None and (config.matching or config.embed_dim)):
        raise FileError("transformers has no such BLIP: it has one class for captioning, one for matching and one for "
                        "question answering, without a temperature")
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
    return Export(configs={"config.json": described, PREPROCESSOR: write_preprocessor(image, task.pixels, "blip")},
                  rows=transformers_rows(config))


def transformers_rows(config: BLIPConfig) -> list[Row]:
    """Return the rows of `BlipFor{ConditionalGeneration, ImageTextRetrieval, QuestionAnswering}`."""
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
    """Return the rows of the projections into the shared space and of the matching head."""
    rows = []
    if config.embed_dim:
        rows += dense("vision_projection", "vision_proj") + dense("text_projection", "text_proj")
    if config.matching:
        rows += dense("matching_head", "itm_head")
    return rows


def text_rows(config: BLIPConfig) -> list[Row]:
    """Return the rows of all text transformers."""
    rows = []
    if config.text.encoder:
        rows += encoder_rows("text", "text_encoder")
    if config.text.decoder:
        rows += decoder_rows("text", config.text)
    if config.answer is not None:
        rows += decoder_rows("answer", config.answer)
    return rows


def encoder_rows(ours: str, theirs: str) -> list[Row]:
    """Return the rows of a text encoder."""
    rows = embedding_rows(ours, f"{theirs}.embeddings")
    for part in (*PARTS, "mlp"):
        rows += part_rows(f"{ours}/blocks/{part}", f"{theirs}.encoder.layer.{{}}", part)
    return rows


def decoder_rows(ours: str, config: MedConfig, theirs: str = "text_decoder") -> list[Row]:
    """Return the rows of a text decoder and its head; beside an encoder, only those that are not shared."""
    rows = [] if config.encoder else embedding_rows(ours, f"{theirs}.bert.embeddings")
    for part in (*PARTS, "mlp"):
        if not config.encoder or part in config.own:
            name = f"causal_{part}" if config.encoder else part
            rows += part_rows(f"{ours}/blocks/{name}", f"{theirs}.bert.encoder.layer.{{}}", part)
    head = f"{theirs}.cls.predictions"
    return [*rows, *dense(f"{ours}/head/transform", f"{head}.transform.dense"),
            *norm(f"{ours}/head/norm", f"{head}.transform.LayerNorm"), Row(f"{ours}/head/bias", f"{head}.bias")]


def embedding_rows(ours: str, theirs: str) -> list[Row]:
    """Return the rows of the token and position tables and of their norm."""
    return [Row(f"{ours}/embedding/tokens/embedding", f"{theirs}.word_embeddings.weight"),
            Row(f"{ours}/embedding/positions", f"{theirs}.position_embeddings.weight"),
            *norm(f"{ours}/embedding/norm", f"{theirs}.LayerNorm")]


def part_rows(ours: str, theirs: str, part: str) -> list[Row]:
    """Return the rows of one branch of every layer, and of the norm after it."""
    if part == "mlp":
        return [*dense(f"{ours}/up", f"{theirs}.intermediate.dense"), *dense(f"{ours}/down", f"{theirs}.output.dense"),
                *norm(f"{ours}_norm", f"{theirs}.output.LayerNorm")]
    name = f"{theirs}.{PARTS[part]}"
    return [*layers.projections(ours, {key: f"{name}.self.{key}" for key in layers.PARTS}),
            *layers.out(ours, f"{name}.output.dense"), *norm(f"{ours}_norm", f"{name}.output.LayerNorm")]


FAMILY = Family(
    name="transformers", matches=lambda files, tensors: (files.json("config.json") or {}).get("model_type") == "blip",
    read=lambda files, tensors: read(files.json("config.json"), tensors, preprocessor(files)), write=write,
    architecture=(BLIPConfig,), resize="bicubic")
