"""CapFilt from scratch on generated scenes: 4,000 images with web texts that are 60 % noise, 2,000 with human captions.

    jaxmm capfilt bootstrap --config configs/capfilt_scenes.py --out runs/capfilt

A BLIP is pre-trained on all of it. A captioner and a filter are fine-tuned from it on the 2,000; they caption and
filter the 4,000. A new BLIP trains on the result. `python -m benchmarks.capfilt_ablation` measures the effect of each
part.
"""

from jaxmm.capfilt.bootstrap import CapFiltConfig
from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Captions, Reranking, Retrieval
from jaxmm.inference.generate import Decoding
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.image_captioning import Captioning

LONGEST = 32
"""Maximum number of tokens of a caption."""


def get_config() -> CapFiltConfig:
    """Return the recipe."""
    vision = ViTConfig(
        transformer=TransformerConfig(width=128, depth=4, heads=2, mlp_dim=384, remat="cheap"), image_size=64, patch=8)
    text = MedConfig(
        transformer=TransformerConfig(width=128, depth=2, heads=2, mlp_dim=384, remat="cheap", init="xavier"),
        vocab_size=None, positions=40, context_width=128)
    data = DataConfig(
        val="scenes:val", batch_size=32,
        # No crop and no flip: the captions mention sizes, left and right.
        image=ImageConfig(size=64, train_crop="squash", eval_crop="squash", flip=False),
        tokenizer=TokenizerConfig(kind="train-wordpiece", vocab_size=512, context_length=30))
    greedy = Captions(decoding=Decoding(beams=1, max_length=LONGEST))
    retrieval = Retrieval(pool=100, captions="first"), Reranking(pool=100, captions="first")
    blip = BLIPPretraining(model=BLIPConfig(vision=vision, text=text, embed_dim=128, temperature=0.02), queue=1024,
                           momentum=0.97, alpha=0.2, ramp=0.5, smoothing=0.0, weights=(0.3, 0.7, 3.0))
    matching = BLIPPretraining(
        model=BLIPConfig(vision=vision, embed_dim=128, temperature=0.02, text=MedConfig(
            transformer=text.transformer, vocab_size=None, positions=40, context_width=128, decoder=False)),
        queue=1024, momentum=0.97, alpha=0.2)
    writing = Captioning(prompt="", smoothing=0.0, model=BLIPConfig(
        vision=vision, embed_dim=None, matching=False, temperature=None, text=MedConfig(
            transformer=text.transformer, vocab_size=None, positions=40, context_width=128, encoder=False)))
    return CapFiltConfig(
        web="scenes:web", human="scenes:train[:2000]",
        pretrain=TrainConfig(task=blip, steps=600, data=data, optimizer=muon(2e-3, 1 / 12), evals=(*retrieval, greedy),
                             log_every=50),
        captioner=TrainConfig(task=writing, steps=1000, data=data, optimizer=muon(1e-3, 0.05, ()), evals=(greedy,),
                              log_every=50),
        filter=TrainConfig(task=matching, steps=300, data=data, optimizer=muon(5e-4, 1 / 6), evals=retrieval,
                           log_every=50),
        decoding=Decoding(sample=True, top_p=0.9, max_length=LONGEST))


def muon(learning_rate: float, warmup: float, multipliers: tuple = ((r"^temperature$", 0.05),)) -> OptimizerConfig:
    """Return the optimizer of `blip_scenes`."""
    return OptimizerConfig(name="muon", momentum=0.95, learning_rate=learning_rate, weight_decay=0.05, warmup=warmup,
                           b2=0.98, multipliers=multipliers)
