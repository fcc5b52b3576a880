"""The files of BLIP's authors (`.pth`): pre-training, captioning, retrieval, VQA, NLVR2.

They hold no configuration. Sizes are read off the weights. Heads of 64, epsilons and token ids are the same for all
released files. Momentum encoders and queues, which only training needs, are left out.
"""

from dataclasses import replace

from jaxmm.config import ImageConfig
from jaxmm.data.sources.nlvr import CLASSES
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig, Part
from jaxmm.models.med_layer import PAIR_CROSS_ATTENTION
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP_PIXELS
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained import layers
from jaxmm.pretrained.families import timm
from jaxmm.pretrained.families.transformers_blip import (
    IGNORED,
    answer_decoder,
    blip_task,
    embedding_rows,
    halves,
    head_rows,
    part_rows,
    text_rows,
    vocabulary,
)
from jaxmm.pretrained.family import Checkpoint, Family
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.layers import dense, depth, norm
from jaxmm.pretrained.table import Row

HEAD = 64
"""Width of an attention head in both towers of every size."""
TRAINING = (r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.", r"^(image|text|idx)_queue$",
            r"^(queue_ptr|ptr_queue)$")
COPIES = r"^text_decoder\.bert\.(embeddings\.|encoder\.layer\.\d+\.({})\.)"
"""Keys under which the decoder repeats tensors that it shares with the encoder."""
NAMES: dict[Part, tuple[str, str]] = {
    "attention": ("attention", "attention.self.query.weight"),
    "cross_attention": ("crossattention", "crossattention.self.query.weight"),
    "mlp": ("intermediate|output", "intermediate.dense.weight")}
"""Names of a part in a layer, and of one of its weights."""


def read(tensors: Tensors) -> Checkpoint:
    """Describe a file of the authors. Raises `FileError` for a file without a text transformer."""
    encoder, decoder = halves(tensors)
    answers = encoder and decoder and "itm_head.weight" not in tensors
    both = encoder and decoder and not answers
    if not encoder and not decoder:
        raise FileError("this BLIP has neither text_encoder nor text_decoder")
    width, _, _, patch = tensors["visual_encoder.patch_embed.proj.weight"].shape
    slots = tensors["visual_encoder.pos_embed"].shape[1] - 1
    side = round(slots**0.5) * patch
    vision = ViTConfig(
        transformer=TransformerConfig(
            width=width, depth=depth(tensors, "visual_encoder.blocks."), heads=width // HEAD, eps=1e-6, init="normal",
            mlp_dim=tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0]),
        image_size=side, patch=patch)
    bert = "text_encoder." if encoder else "text_decoder.bert."
    vocab_size, text_width = tensors[f"{bert}embeddings.word_embeddings.weight"].shape
    cross = "self0" if f"{bert}encoder.layer.0.crossattention.self0.key.weight" in tensors else "self"
    own = tuple(part for part in NAMES if both and not shared(tensors, part))
    text = MedConfig(
        transformer=TransformerConfig(
            width=text_width, depth=depth(tensors, f"{bert}encoder.layer."), heads=text_width // HEAD, eps=1e-12,
            init="normal", mlp_dim=tensors[f"{bert}encoder.layer.0.intermediate.dense.weight"].shape[0]),
        vocab_size=vocab_size, positions=tensors[f"{bert}embeddings.position_embeddings.weight"].shape[0],
        context_width=tensors[f"{bert}encoder.layer.0.crossattention.{cross}.key.weight"].shape[1], encoder=encoder,
        decoder=decoder and not answers, own=own if both else ("attention",), decode_id=vocab_size - 2,
        encode_id=vocab_size - 1, merge_from=first_merge(tensors) if cross == "self0" else None)
    embed = tensors["vision_proj.weight"].shape[0] if "vision_proj.weight" in tensors else None
    model = BLIPConfig(vision=vision, text=text, embed_dim=embed, matching="itm_head.weight" in tensors,
                       answer=answer_decoder(text, tensors) if answers else None,
                       temperature=0.07 if "temp" in tensors else None)
    labels = CLASSES if model.pair else None
    copies = "|".join(names for part, (names, _) in NAMES.items() if part not in own) if both else None
    return Checkpoint(
        task=blip_task(model, CLIP_PIXELS), rows=rows(model), vocabulary=vocabulary(model), labels=labels,
        image=ImageConfig(size=side, eval_crop="squash"),
        ignore=(*IGNORED, *TRAINING, *([COPIES.format(copies)] if copies else [])))


def rows(config: BLIPConfig) -> list[Row]:
    """Return the rows of a BLIP in the authors' names."""
    vision = [Row(f"vision/{row.ours}", f"visual_encoder.{row.theirs}", row.op, row.part, row.parts)
              for row in timm.rows(config.vision)]
    temperature = [Row("temperature", "temp")] if config.temperature is not None else []
    text = text_rows(config) + head_rows(config) if not config.pair else pair_rows(config.text.merge_from)
    return vision + text + temperature


def pair_rows(first: int) -> list[Row]:
    """Return the rows of the text transformer that reads two images, merged from layer `first` on, and of its head."""
    layer = "text_encoder.encoder.layer.{}"
    name, rows = f"{layer}.crossattention", embedding_rows("text", "text_encoder.embeddings")
    for part in ("attention", "mlp"):
        rows += part_rows(f"text/blocks/{part}", layer, part)
    for number, twin in enumerate(PAIR_CROSS_ATTENTION):
        rows += layers.projections(f"text/blocks/{twin}", {key: f"{name}.self{number}.{key}" for key in layers.PARTS})
        rows += layers.out(f"text/blocks/{twin}", f"{name}.output.dense{number}")
    merge = [replace(row, first=first) for row in dense("text/merge", f"{name}.output.merge_layer")]
    return [*rows, *norm("text/blocks/cross_attention_norm", f"{name}.output.LayerNorm"), *merge,
            *dense("pair_hidden", "cls_head.0"), *dense("pair_head", "cls_head.2")]


def first_merge(tensors: Tensors) -> int:
    """Return the first layer that merges the attention to two images.

    Without any, return the middle layer, so that the merge layers are reported as missing.
    """
    prefix = "text_encoder.encoder.layer."
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in tensors if ".output.merge_layer." in key]
    return min(numbers, default=depth(tensors, prefix) // 2)


def shared(tensors: Tensors, part: Part) -> bool:
    """Return whether encoder and decoder share `part`, judged by the first layer."""
    name = f"encoder.layer.0.{NAMES[part][1]}"
    return bool((tensors[f"text_encoder.{name}"].read() == tensors[f"text_decoder.bert.{name}"].read()).all())


FAMILY = Family(name="salesforce", read=lambda files, tensors: read(tensors),
                matches=lambda files, tensors: "visual_encoder.patch_embed.proj.weight" in tensors)
