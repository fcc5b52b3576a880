r"""BLIP that writes captions of COCO's photographs, from a pre-trained BLIP: the paper's fine-tuning (section 4.3).

    python run_train.py --config configs/blip_coco_caption.py --init.from model_base_14M.pth \
        --data.tokenizer.file vocab.txt --data.train coco:dataset_coco.json:train --data.val coco:dataset_coco.json:test

384 pixels, 256 pairs a step, 5 epochs, AdamW with a cosine from 1e-5; captions by 3 beams. The paper has BLEU-4 38.6
and CIDEr 129.7 on the Karpathy test split from the pre-training on 14M pictures, 39.4 and 131.4 from that on 129M
(table 1). Begin with a pre-trained file, not with one that was fine-tuned on these captions already. Their RandAugment,
whose operations are not ours, is left out. We have not run it at this scale.

Plan on v5e:4x4 (16 chips): fits in 11.26 GiB of 15.75 GiB a chip, 2,160 pictures/s and 28% of peak by XLA's estimate.
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Captions
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.models.vit import vit
from jaxmm.tasks.image_captioning import Captioning

EPOCH = 566_747 // 256


def get_config() -> TrainConfig:
    """The recipe."""
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
