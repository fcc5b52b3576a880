"""Trained models that are small: towers with random weights, a vocabulary, pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmm.config import ImageConfig, TokenizerConfig
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.inference.model import Model
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.tasks.image_classification import Classification
from jaxmm.tasks.pair_classification import PairClassification
from jaxmm.tasks.question_answering import QuestionAnswering
from tests.tasks.common import params

SIDE, LENGTH = 12, 9
CORPUS = ["a small red circle", "a large blue square", "two green stars above a heart"] * 3
STACK = TransformerConfig(width=24, depth=3, heads=3, mlp_dim=40, eps=1e-5)
VISION = ViTConfig(transformer=STACK, image_size=SIDE, patch=4, pre_norm=True, patch_bias=False)
TOKENIZER = make_tokenizer(TokenizerConfig(vocab_size=90, context_length=LENGTH), CORPUS)
TEXT = TextConfig(transformer=replace(STACK, width=16, heads=2), vocab_size=TOKENIZER.vocab_size, context_length=LENGTH,
                  pool="eos", eos_id=TOKENIZER.eos_id)
CLIP = ContrastiveLearning(model=CLIPConfig(vision=VISION, text=TEXT, embed_dim=20))
VIT = Classification(model=ViTConfig(transformer=replace(STACK, eps=1e-6), image_size=SIDE, patch=4, classes=5))
IMAGE = ImageConfig(size=SIDE, eval_resize=1.5)
LABELS = ("ant", "bee", "cat", "dog", "elk")


def clip() -> Model:
    return Model(task=CLIP, params=params(CLIP), preprocessing=IMAGE, tokenizer=TOKENIZER)


def vit() -> Model:
    return Model(task=VIT, params=params(VIT), preprocessing=IMAGE, labels=LABELS)


MED = MedConfig(transformer=replace(STACK, width=16, heads=2, init="normal"), positions=24, context_width=24,
                vocab_size=TOKENIZER.vocab_size + 2, decode_id=TOKENIZER.vocab_size, encode_id=TOKENIZER.vocab_size + 1,
                end_id=TOKENIZER.eos_id)
TOWER = replace(VIT.model, classes=None)
CAPTIONER = Captioning(prompt="a", model=BLIPConfig(vision=TOWER, text=replace(MED, encoder=False), embed_dim=None,
                                                    matching=False, temperature=None))
MATCHER = BLIPPretraining(model=BLIPConfig(vision=TOWER, text=replace(MED, decoder=False), embed_dim=12,
                                           temperature=None))
PAIR = PairClassification(model=BLIPConfig(vision=TOWER, text=replace(MED, decoder=False, merge_from=2), embed_dim=None,
                             matching=False, temperature=None))


ANSWERER = QuestionAnswering(model=BLIPConfig(
    vision=replace(TOWER, transformer=replace(TOWER.transformer, width=16, heads=2)),
    text=replace(MED, decoder=False, context_width=16), answer=replace(MED, encoder=False, context_width=16),
    embed_dim=None, matching=False, temperature=None))


def captioner() -> Model:
    return Model(task=CAPTIONER, params=params(CAPTIONER), preprocessing=IMAGE, tokenizer=TOKENIZER)


def answerer() -> Model:
    return Model(task=ANSWERER, params=params(ANSWERER), preprocessing=IMAGE, tokenizer=TOKENIZER)


def matcher() -> Model:
    return Model(task=MATCHER, params=params(MATCHER), preprocessing=IMAGE, tokenizer=TOKENIZER)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, (side := 17 + i % 5, 2 * side, 3), np.uint8) for i in range(count)]


def picture_files(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures(count)):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return [str(folder / f"{i:03}.png") for i in range(count)]
