"""BLIP against transformers' classes at the same random weights, fp32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from jaxmm.inference.answering import ANSWERS
from jaxmm.inference.generate import Decoding, generate
from jaxmm.inference.model import load
from jaxmm.inference.parity import compare, golden_inputs
from jaxmm.losses.language_modeling import language_loss
from jaxmm.models.blip import BLIP, BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import CLIP_PIXELS
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.pretrained.families.transformers_blip import transformers_rows
from jaxmm.pretrained.io.files import open_tensors
from jaxmm.pretrained.table import read_params
from jaxmm.tasks.blip_common import blip_decoder
from jaxmm.tasks.question_answering import QuestionAnswering
from tests.parity.test_loading import shaken
from tests.parity.test_published import close
from tests.training.common import assert_same_bits

pytestmark = pytest.mark.parity
SIDE, LENGTH, VOCABULARY = 20, 9, 90
STACK = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80}
VISION = STACK | {"hidden_size": 36, "image_size": SIDE, "patch_size": 5, "layer_norm_eps": 1e-6}
TEXT = STACK | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "encoder_hidden_size": 36, "bos_token_id": 88,
                "sep_token_id": 87, "eos_token_id": 87}
STACKED = TransformerConfig(width=48, depth=3, heads=3, mlp_dim=80, eps=1e-12)
MED = MedConfig(transformer=STACKED, vocab_size=VOCABULARY, positions=16, context_width=36, end_id=87, decode_id=88,
                encode_id=89)
TOWER = ViTConfig(transformer=replace(STACKED, width=36, eps=1e-6), image_size=SIDE, patch=5)
NONE = {"embed_dim": None, "matching": False, "temperature": None}
RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, SIDE, SIDE, 3), np.float32)
WORDS = RNG.integers(1, 86, (2, LENGTH)).astype(np.int32)
WORDS[1, 6:] = 0
MASK = torch.from_numpy((WORDS != 0).astype(np.int64))


def pair(kind, config, tmp_path, **fields):
    """Their model, our parameters with their values, and our module."""
    vision = VISION | {"hidden_size": config.vision.transformer.width}
    described = transformers.BlipConfig(text_config=TEXT | fields, vision_config=vision, image_text_hidden_size=20)
    theirs = shaken(kind(described))
    for name, parameter in theirs.named_parameters():
        if "word_embeddings" in name or ("crossattention" in name and parameter.ndim > 1):
            parameter.data.mul_(8)      # so that the context and earlier tokens matter
        if name.endswith("bias"):
            parameter.data.sub_(0.9)
    theirs.save_pretrained(tmp_path)
    module = BLIP(config)
    like = jax.eval_shape(lambda key: module.init(key, jnp.asarray(IMAGE), jnp.asarray(WORDS), train=False)["params"],
                          jax.random.key(0))
    rows = transformers_rows(config)
    params = read_params(open_tensors(tmp_path / "model.safetensors"), rows, like, name="theirs",
                         ignore=(r"\.position_ids$", r"\.predictions\.decoder\."))
    return theirs, {"params": params}, module


def torched(array):
    return torch.from_numpy(np.array(array))


@torch.no_grad()
def test_captioning(tmp_path, record_property):
    """With the loss: what is -100 there does not count here, smoothing is that of their configuration."""
    config = BLIPConfig(vision=TOWER, text=replace(MED, encoder=False), **NONE)
    theirs, params, module = pair(transformers.BlipForConditionalGeneration, config, tmp_path, label_smoothing=0.1)
    image_tokens = module.apply(params, jnp.asarray(IMAGE), train=False, method=BLIP.encode_image)
    want = theirs(pixel_values=torched(IMAGE.transpose(0, 3, 1, 2)), input_ids=torched(WORDS).long(),
                  attention_mask=MASK, labels=torched(WORDS).long().masked_fill(MASK == 0, -100))
    close(image_tokens, want.image_embeds, 1e-4, "BLIP image tokens", record_property)
    logits = module.apply(params, jnp.asarray(WORDS), image_tokens, train=False, method=BLIP.decode)
    there = WORDS != 0
    close(logits[there], want.logits[torched(there)], 1e-4, "BLIP caption logits", record_property)
    loss = language_loss(logits, jnp.asarray(WORDS), jnp.asarray(there), 0.1)
    close(loss, want.loss, 1e-5, "BLIP caption loss", record_property)
    unsmoothed = language_loss(logits, jnp.asarray(WORDS), jnp.asarray(there))
    assert abs(float(unsmoothed - loss)) > 1e-2


@torch.no_grad()
def test_matching(tmp_path, record_property):
    config = BLIPConfig(vision=TOWER, text=replace(MED, decoder=False), embed_dim=20, temperature=None,
                        encode_token=False)
    theirs, params, module = pair(transformers.BlipForImageTextRetrieval, config, tmp_path)
    ids, pixels = torched(WORDS).long(), torched(IMAGE.transpose(0, 3, 1, 2))
    got = module.apply(params, jnp.asarray(IMAGE), jnp.asarray(WORDS), train=False)
    close(got.match_logits, theirs(ids, pixels, attention_mask=MASK).itm_score, 1e-4, "BLIP matching logits",
          record_property)
    cosine = theirs(ids, pixels, attention_mask=MASK, use_itm_head=False).itm_score
    alone = theirs.text_encoder(ids, attention_mask=MASK).last_hidden_state[:, 0]
    close(got.text, torch.nn.functional.normalize(theirs.text_proj(alone)), 2e-5, "BLIP text features",
          record_property)
    close(got.image @ got.text.T, cosine, 2e-5, "BLIP cosines", record_property)
    ids[:, 0] = 89      # what training read, and the switch reproduces
    other = BLIP(replace(config, encode_token=True)).apply(params, jnp.asarray(IMAGE), jnp.asarray(WORDS), train=False)
    close(other.match_logits, theirs(ids, pixels, attention_mask=MASK).itm_score, 1e-4,
          "BLIP matching logits with [ENC]", record_property)
    assert np.abs(other.match_logits - got.match_logits).max() > 1e-3


# transformers gives question encoder and answer decoder one configuration, whose context is the image's width
ANSWERING = BLIPConfig(vision=replace(TOWER, transformer=replace(STACKED, eps=1e-6)), encode_token=False,
                       text=replace(MED, decoder=False, context_width=48),
                       answer=replace(MED, encoder=False, context_width=48), **NONE)


@torch.no_grad()
def test_answering(tmp_path, record_property):
    theirs, params, module = pair(transformers.BlipForQuestionAnswering, ANSWERING, tmp_path, encoder_hidden_size=48,
                                  label_smoothing=0.1)
    answers = RNG.integers(1, 86, (2, 5)).astype(np.int32)
    want = theirs(torched(WORDS).long(), torched(IMAGE.transpose(0, 3, 1, 2)), attention_mask=MASK,
                  decoder_input_ids=torched(answers).long(), decoder_attention_mask=torch.ones(2, 5).long())
    image_tokens = module.apply(params, jnp.asarray(IMAGE), train=False, method=BLIP.encode_image)
    states = module.apply(params, jnp.asarray(WORDS), image_tokens, train=False, method=BLIP.encode_text_with_image)
    logits = module.apply(params, jnp.asarray(answers), states, train=False, context_mask=jnp.asarray(WORDS != 0),
                          method=BLIP.decode)
    for row, length in enumerate((WORDS != 0).sum(axis=1)):      # its decoder looks at what the mask hides
        decoder = theirs.text_decoder(input_ids=torched(answers[row:row + 1]).long(),
                                      encoder_hidden_states=torched(states[row:row + 1, :length]))
        close(logits[row:row + 1], decoder.logits, 1e-4, "BLIP answer logits", record_property)
    close(states[WORDS != 0], theirs.text_encoder(
        input_ids=torched(WORDS).long(), attention_mask=MASK, encoder_hidden_states=want.image_embeds,
        encoder_attention_mask=torch.ones(want.image_embeds.shape[:2]).long()).last_hidden_state[MASK.bool()], 1e-4,
        "BLIP question states", record_property)
    full = WORDS.copy()
    full[1, 6:] = 7
    given = np.concatenate([np.full((2, 1), 2), answers[:, 1:], np.full((2, 1), 87), np.zeros((2, 1))], axis=1).astype(
        np.int32)
    given[1, 3:] = [87, 0, 0, 0]
    image = RNG.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    task = QuestionAnswering(model=ANSWERING)
    outputs = task.encode(params["params"], {
        "image": jnp.asarray(image), "tokens": jnp.asarray(full), "answers": jnp.asarray(given[:, None]),
        "answer_weight": jnp.ones((2, 1))}, jax.random.key(0))
    pixels = torched(np.asarray(task.pixels(jnp.asarray(image))).transpose(0, 3, 1, 2))
    states = theirs.text_encoder(
        input_ids=torched(full).long(), encoder_hidden_states=theirs.vision_model(pixels).last_hidden_state,
        attention_mask=torch.ones(2, LENGTH).long()).last_hidden_state
    given[:, 0] = MED.decode_id
    labels = torched(np.where(given == 0, -100, given)).long()
    losses = theirs.text_decoder(input_ids=torched(given).long(), attention_mask=torched(given != 0).long(),
                                 encoder_hidden_states=states, labels=labels, reduction="none").loss
    close(outputs["loss"], losses, 1e-3, "BLIP losses of answers", record_property)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_answers_are_the_same_tokens(beams, tmp_path):
    theirs, params, module = pair(transformers.BlipForQuestionAnswering, ANSWERING, tmp_path, encoder_hidden_size=48)
    count = 6
    image = RNG.standard_normal((count, SIDE, SIDE, 3), np.float32) * 3
    words = RNG.integers(1, 86, (count, LENGTH)).astype(np.int32)
    words[3:, 6:] = 0
    want = theirs.generate(torched(words).long(), torched(image.transpose(0, 3, 1, 2)), num_beams=beams, min_length=1,
                           attention_mask=torched(words != 0).long(), max_length=10, do_sample=False)
    want = np.pad(want.numpy(), ((0, 0), (0, 10 - want.shape[1])))
    assert len({tuple(row) for row in want}) > 1      # images and questions matter

    @jax.jit
    def run(params):
        image_tokens = module.apply(params, jnp.asarray(image), train=False, method=BLIP.encode_image)
        states = module.apply(params, jnp.asarray(words), image_tokens, train=False, method=BLIP.encode_text_with_image)
        keys, decoding = jax.random.split(jax.random.key(0), count), replace(ANSWERS, beams=beams)
        return [generate(blip_decoder(ANSWERING, CLIP_PIXELS), params["params"], states, jnp.full((count, 1), 2),
                         jnp.ones(count, jnp.int32), keys, decoding, mask).tokens[:, 0]
                for mask in (jnp.asarray(words != 0), None)]

    hidden, shown = run(params)
    np.testing.assert_array_equal(hidden[:3], want[:3])
    np.testing.assert_array_equal(shown, want)      # transformers looks at padding too


KINDS = {
    "captions": (transformers.BlipForConditionalGeneration,
                 BLIPConfig(vision=TOWER, text=replace(MED, encoder=False), **NONE)),
    "matching": (transformers.BlipForImageTextRetrieval,
                 BLIPConfig(vision=TOWER, text=replace(MED, decoder=False), embed_dim=20, temperature=None)),
    "answers": (transformers.BlipForQuestionAnswering, replace(ANSWERING, encode_token=True))}


WRITTEN = ("token logits", "loss", "ids, greedy", "ids, 3 beams")
PLACES = {"captions": WRITTEN, "answers": ("question states", *WRITTEN),
          "matching": ("image embedding", "text embedding", "similarities", "matching logits")}
LAYERS = {"captions": ("vision", "writing"), "matching": ("vision", "text", "matching"),
          "answers": ("vision", "question", "writing")}


def test_golden_questions_have_no_padding():
    """Their decoder would look at it; answers have some, and hide it."""
    images, tokens = golden_inputs(ANSWERING)
    assert images.shape == (2, SIDE, SIDE, 3) and tokens.shape == (2, 32)
    question, answer = tokens[:, :16], tokens[:, 16:]
    np.testing.assert_array_equal((question == MED.pad_id).sum(axis=1), [0, 0])
    np.testing.assert_array_equal((answer == MED.pad_id).sum(axis=1), [8, 0])
    assert (question[:, -1] == MED.end_id).all() and (answer[[0, 1], [7, 15]] == MED.end_id).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folders_in_and_out(kind, tmp_path):
    cls, config = KINDS[kind]
    theirs, params, _ = pair(cls, config, tmp_path / "theirs", encoder_hidden_size=config.text.context_width)
    transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "theirs")
    names = ["[PAD]", "[UNK]", "[CLS]", "a", "picture", "of", *(f"w{i}" for i in range(81)), "[SEP]"]
    (tmp_path / "theirs" / "vocab.txt").write_text("\n".join(names) + "\n")
    rows, computed, library = compare(tmp_path / "theirs")
    assert library == "transformers" and {row.name for row in rows} == {"image tokens"} | set(PLACES[kind]) | {
        f"{part} layer {i + 1}" for part in LAYERS[kind] for i in range(3 - (part == "vision"))}
    assert all(row.largest <= (0 if row.name.startswith("ids") else 1e-4) for row in rows), rows
    assert kind == "matching" or (computed["ids, 3 beams"][0] != computed["ids, 3 beams"][1]).any()      # by image
    ours = load(tmp_path / "theirs")
    assert_same_bits(ours.params, params["params"])
    images = [RNG.integers(0, 256, (SIDE + i, SIDE, 3), np.uint8) for i in range(5)]
    pixels = transformers.BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})(
        [Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    if kind == "captions":
        prompt = np.tile(np.array([[88, 3, 4, 5, 87]]), (5, 1))      # [DEC] a picture of [SEP]
        want = theirs.generate(pixel_values=pixels, input_ids=torched(prompt), max_length=12, num_beams=3, min_length=5)
        words = [" ".join(names[i] for i in row[4:].tolist() if i not in (0, 87)) for row in want]
        captions = ours.caption(images, decoding=Decoding(beams=3, min_length=5, max_length=12), top=3)
        assert [row[0][0] for row in captions] == words
        assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in captions)
    elif kind == "answers":
        question = "a picture of w3 w7"
        ids = torched(ours.tokenize([question])[:, :7]).long()      # without padding
        ids[:, 0] = 89
        want = theirs.generate(ids.repeat(5, 1), pixels, num_beams=3, max_length=10, min_length=1)
        words = [" ".join(names[i] for i in row[1:].tolist() if i not in (0, 87)) for row in want]
        assert [row[0][0] for row in ours.answer(images, question)] == words
    else:
        texts = ["w3 a w7", "picture of w1 w2 w3", "w40"]
        ids = torched(ours.tokenize(texts)).long()
        ids[:, 0] = 89
        for i in range(5):
            score = theirs(ids, pixels[i:i + 1].repeat(3, 1, 1, 1), attention_mask=(ids != 0).long()).itm_score
            np.testing.assert_allclose(ours.match(images[i:i + 1], texts)[0], score.softmax(1)[:, 1], atol=1e-5)
        assert ours.similarity(images, texts).shape == (5, 3)
    ours.save(tmp_path / "ours", format="transformers")
    back, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    wanted, restored = theirs.state_dict(), back.state_dict()
    assert wanted.keys() == restored.keys() and all(torch.equal(wanted[name], restored[name]) for name in wanted)
    again = load(tmp_path / "ours")
    assert (again.config, again.preprocessing, again.task.pixels) == (ours.config, ours.preprocessing, ours.task.pixels)


@pytest.mark.parametrize("options", [
    {}, {"beams": 3}, {"beams": 3, "min_length": 7}, {"beams": 4, "length_penalty": 2.0},
    {"beams": 3, "repetition_penalty": 1.3}], ids=str)
@torch.no_grad()
def test_captions_are_the_same_tokens(options, tmp_path):
    config = BLIPConfig(vision=TOWER, text=replace(MED, encoder=False), **NONE)
    theirs, params, module = pair(transformers.BlipForConditionalGeneration, config, tmp_path)
    count = 6
    image = RNG.standard_normal((count, SIDE, SIDE, 3), np.float32) * 3
    prompt = np.tile(np.array([[88, 5, 9]], np.int32), (count, 1))
    decoding = Decoding(max_length=14, **options)
    image_tokens = module.apply(params, jnp.asarray(image), train=False, method=BLIP.encode_image)
    run = jax.jit(lambda params, image_tokens: generate(
        blip_decoder(config, CLIP_PIXELS), params, image_tokens, jnp.asarray(prompt), jnp.full(count, 3),
        jax.random.split(jax.random.key(0), count), decoding))
    got = np.asarray(run(params["params"], image_tokens).tokens[:, 0])
    # transformers takes the last token off what it is given
    want = theirs.generate(
        pixel_values=torched(image.transpose(0, 3, 1, 2)), input_ids=torched(np.pad(prompt, ((0, 0), (0, 1)))).long(),
        max_length=14, num_beams=decoding.beams, min_length=decoding.min_length, do_sample=False,
        length_penalty=decoding.length_penalty, repetition_penalty=decoding.repetition_penalty)
    want = np.pad(want.numpy(), ((0, 0), (0, 14 - want.shape[1])))
    assert len({tuple(row) for row in want}) > 1      # images matter
    np.testing.assert_array_equal(got, want)
