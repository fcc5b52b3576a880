r"""BLIP captioning on COCO, from a pre-trained BLIP: the paper's fine-tuning (section 4.3).

    python run_train.py --config configs/blip_coco_caption.py --init.from model_base_14M.pth \
        --data.tokenizer.file vocab.txt --data.train coco:dataset_coco.json:train --data.val coco:dataset_coco.json:test

384 pixels, batch size 256, 5 epochs, AdamW with a cosine schedule from 1e-5; captions by beam search with 3 beams. The
paper reports BLEU-4 38.6 and CIDEr 129.7 on the Karpathy test split after pre-training on 14M images, 39.4 and 131.4
after 129M (table 1). Start from a pre-trained file, not from one already fine-tuned on these captions. The paper's
RandAugment is left out, because its operations differ from ours. We have not run it at this scale.

Plan on v5e:4x4 (16 chips): fits in 11.26 GiB of 15.75 GiB per chip, 2,160 images/s and 28% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Captions
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import vit
from jaxmm.tasks.image_captioning import Captioning

EPOCH = 566_747 // 256


def get_config() -> TrainConfig:
    """Return the recipe."""
    stack = {"eps": 1e-6, "init": "normal", "remat": "cheap"}
    model = BLIPConfig(vision=vit("B/16", image_size=384, stack=stack), text=MedConfig(encoder=False), embed_dim=None,
                       matching=False, temperature=None)
    return TrainConfig(
        task=Captioning(model=model),
        init=InitConfig(source="model_base_14M.pth"),
        steps=5 * EPOCH,
        data=DataConfig(
            train="coco:dataset_coco.json:train", val="coco:dataset_coco.json:test",
            batch_size=256, workers=16,
            image=ImageConfig(size=384, scale=(0.5, 1.0), eval_crop="squash"),
            tokenizer=TokenizerConfig(kind="bert", file="vocab.txt", context_length=40)),
        optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.05, decay="", warmup=0.0, clip=None),
        evals=(Captions(batch_size=64),),
        eval_every=EPOCH, log_every=50)
