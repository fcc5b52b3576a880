"""Where BLIP's weights lie: Salesforce's own files, and transformers' classes.

Both keep a text transformer in BERT's names, and the decoder of a model with both in a second one, whose shared parts
are copies of the first's.
"""

from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.pretrained import layers, timm
from jaxmm.pretrained.layers import dense, norm
from jaxmm.pretrained.tables import CONV, Row, lead

PARTS = {"attention": "attention", "cross_attention": "crossattention"}


def transformers_rows(config: BLIPConfig) -> list[Row]:
    """transformers' `BlipForConditionalGeneration`, `BlipForImageTextRetrieval`, `BlipForQuestionAnswering`."""
    vision = "vision_model"
    block = {"attention": ("self_attn.qkv.weight", "self_attn.qkv.bias"), "out_name": "self_attn.projection",
             "mlp": ("mlp.fc1", "mlp.fc2"), "norms": ("layer_norm1", "layer_norm2")}
    rows = [
        Row("vision/patches/kernel", f"{vision}.embeddings.patch_embedding.weight", CONV),
        Row("vision/patches/bias", f"{vision}.embeddings.patch_embedding.bias"),
        Row("vision/class_token", f"{vision}.embeddings.class_embedding", lead(2)),
        Row("vision/positions", f"{vision}.embeddings.position_embedding", lead(1)),
        *layers.layers("vision/encoder", f"{vision}.encoder.layers.{{}}", **block),
        *norm("vision/norm", f"{vision}.post_layernorm")]
    return rows + text_rows(config) + head_rows(config)


def salesforce_rows(config: BLIPConfig) -> list[Row]:
    """The files of the authors' repository, without momentum copies and queues."""
    vision = [Row(f"vision/{row.ours}", f"visual_encoder.{row.theirs}", row.op, row.part, row.parts)
              for row in timm.rows(config.vision)]
    temperature = [Row("temperature", "temp")] if config.temperature is not None else []
    return vision + text_rows(config) + head_rows(config) + temperature


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
