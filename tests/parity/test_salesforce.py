"""The files of BLIP's authors: their names, put on transformers' weights by hand, compute what transformers does."""

import re

import jax.numpy as jnp
import pytest
import torch
import transformers

from jaxmm.inference.model import load
from jaxmm.models.blip import BLIP
from jaxmm.pretrained.io.files import FileError
from tests.parity.test_blip import IMAGE, MASK, SIDE, TEXT, VISION, WORDS, shaken, torched
from tests.parity.test_published import close

pytestmark = pytest.mark.parity
WIDE = {"num_attention_heads": 2}      # heads of 64, as all released models have
VISION = VISION | WIDE | {"hidden_size": 128}
TEXT = TEXT | WIDE | {"hidden_size": 128, "encoder_hidden_size": 128, "vocab_size": 120,
                      "bos_token_id": 118, "sep_token_id": 102}
NAMES = (("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
         ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
         ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
         (r"vision_model.encoder.layers.(\d+).layer_norm", r"visual_encoder.blocks.\1.norm"),
         (r"vision_model.encoder.layers.(\d+).self_attn.qkv", r"visual_encoder.blocks.\1.attn.qkv"),
         (r"vision_model.encoder.layers.(\d+).self_attn.projection", r"visual_encoder.blocks.\1.attn.proj"),
         (r"vision_model.encoder.layers.(\d+).mlp", r"visual_encoder.blocks.\1.mlp"),
         ("vision_model.post_layernorm", "visual_encoder.norm"))


def theirs(kind):
    return shaken(kind(transformers.BlipConfig(text_config=TEXT, vision_config=VISION, image_text_hidden_size=20)))


def renamed(model):
    """The weights under the authors' names."""
    weights = {}
    for key, value in model.state_dict().items():
        for old, new in NAMES:
            key = re.sub(f"^{old}", new, key)
        weights[key] = value
    return weights


def opened(weights, path):
    torch.save({"model": weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, path)
    return load(path)


def ids():
    return torched(WORDS).long()


def pixels():
    return torched(IMAGE.transpose(0, 3, 1, 2))


@torch.no_grad()
def test_captioning(tmp_path, record_property):
    model = theirs(transformers.BlipForConditionalGeneration)
    ours = opened(renamed(model), tmp_path / "caption.pth")
    assert (ours.config.text.encoder, ours.config.embed_dim, ours.preprocessing.size) == (False, None, SIDE)
    assert (ours.config.text.decode_id, ours.config.text.encode_id) == (118, 119)
    image_tokens = ours.module.apply({"params": ours.params}, jnp.asarray(IMAGE), train=False, method=BLIP.encode_image)
    logits = ours.module.apply({"params": ours.params}, jnp.asarray(WORDS), image_tokens, train=False,
                               method=BLIP.decode)
    want = model(pixel_values=pixels(), input_ids=ids(), attention_mask=MASK).logits
    close(logits[WORDS != 0], want[MASK.bool()], 1e-4, "Salesforce caption logits", record_property)


@pytest.mark.parametrize("own", [("attention",), ("attention", "mlp"), ()], ids=str)
@torch.no_grad()
def test_pretraining_with_its_copies_and_queues(own, tmp_path, record_property):
    matching, captioning = (theirs(kind) for kind in (transformers.BlipForImageTextRetrieval,
                                                      transformers.BlipForConditionalGeneration))
    bert, encoder = captioning.text_decoder.bert, matching.text_encoder
    bert.embeddings.load_state_dict(encoder.embeddings.state_dict())
    captioning.vision_model.load_state_dict(matching.vision_model.state_dict())
    for layer, other in zip(bert.encoder.layer, encoder.encoder.layer, strict=True):
        layer.crossattention.load_state_dict(other.crossattention.state_dict())
        if "mlp" not in own:
            layer.intermediate.load_state_dict(other.intermediate.state_dict())
            layer.output.load_state_dict(other.output.state_dict())
        else:
            layer.intermediate.dense.weight.mul_(1.1)
        if "attention" not in own:
            layer.attention.load_state_dict(other.attention.state_dict())
        else:
            layer.attention.self.query.weight.mul_(1.1)
    weights = renamed(matching) | renamed(captioning)
    twins = {re.sub(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.", r"\1_m.", key): value * 2
             for key, value in weights.items() if key.startswith(("visual_", "text_encoder", "vision_p", "text_p"))}
    queues = {"image_queue": torch.zeros(20, 12), "text_queue": torch.zeros(20, 12), "queue_ptr": torch.zeros(1).long(),
              "temp": torch.tensor(0.07), "text_encoder.embeddings.position_ids": torch.arange(16)[None]}
    ours = opened(weights | twins | queues, tmp_path / "pretrain.pth")
    assert ours.config.text.own == own and ours.config.temperature == 0.07
    assert float(ours.params["temperature"]) == pytest.approx(0.07)
    first = ids()
    first[:, 0] = ours.config.text.encode_id
    got = ours.module.apply({"params": ours.params}, jnp.asarray(IMAGE), jnp.asarray(WORDS), train=False)
    want = matching(first, pixels(), attention_mask=MASK).itm_score
    close(got.match_logits, want, 1e-4, "Salesforce matching logits", record_property)
    cosine = matching(ids(), pixels(), attention_mask=MASK, use_itm_head=False).itm_score
    close(got.image @ got.text.T, cosine, 2e-5, "Salesforce cosines", record_property)
    want = captioning(pixel_values=pixels(), input_ids=ids(), attention_mask=MASK).logits
    close(got.token_logits[WORDS != 0], want[MASK.bool()], 1e-4, "Salesforce language logits", record_property)


@torch.no_grad()
def test_questions(tmp_path, record_property):
    model = theirs(transformers.BlipForQuestionAnswering)
    ours = opened(renamed(model), tmp_path / "vqa.pth")
    assert (ours.config.matching, ours.config.embed_dim, ours.config.answer.context_width) == (False, None, 128)
    image_tokens = ours.module.apply({"params": ours.params}, jnp.asarray(IMAGE), train=False, method=BLIP.encode_image)
    states = ours.module.apply({"params": ours.params}, jnp.asarray(WORDS), image_tokens, train=False,
                               method=BLIP.encode_text_with_image)
    first = ids()
    first[:, 0] = ours.config.text.encode_id
    theirs_states = model.text_encoder(
        input_ids=first, attention_mask=MASK, encoder_hidden_states=torched(image_tokens),
        encoder_attention_mask=torch.ones(image_tokens.shape[:2]).long()).last_hidden_state
    close(states[WORDS != 0], theirs_states[MASK.bool()], 1e-4, "Salesforce question states", record_property)
    logits = ours.module.apply({"params": ours.params}, jnp.asarray(WORDS[:, :4]), states, train=False,
                               method=BLIP.decode)
    want = model.text_decoder(input_ids=ids()[:, :4], encoder_hidden_states=torched(states)).logits
    close(logits, want, 1e-4, "Salesforce answer logits", record_property)


@torch.no_grad()
def test_what_is_not_supported_is_said(tmp_path):
    weights = renamed(theirs(transformers.BlipForImageTextRetrieval))
    del weights["itm_head.bias"]
    with pytest.raises(FileError, match=r"1 missing: itm_head\.bias"):
        opened(weights, tmp_path / "short.pth")
