r"""BLIP base pre-trained as in the paper (Li et al. 2022, section 4.1), on your own pairs.

    python run_train.py --config configs/blip_b16_pretrain.py --workdir runs/blip \
        --init.from facebook/deit-base-patch16-224 --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file vocab.txt

The picture tower begins as DeiT's, the text transformer anew (the authors': as BERT base). 20 epochs of 14 million
pictures, 2,880 a step, the learning rate x 0.9 an epoch, weight decay on every parameter; hard negatives from 90 pairs,
those of one of their 32 GPUs. The paper, after fine-tuning on COCO, has text recall@1 78.4 and image recall@1 60.7
without CapFilt (table 1), 80.6 and 63.1 with it. Their RandAugment, whose operations are not ours, is left out. We have
not run it at this scale.

Plan on v5e:4x8 (32 chips): fits in 11.90 GiB of 15.75 GiB a chip, 5,703 pictures/s and 26% of peak by XLA's estimate.
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Reranking, Retrieval
from jaxmm.models.blip import blip
from jaxmm.tasks.blip_pretraining import BLIPPretraining

BATCH, EPOCHS = 2_880, 20
EPOCH = 14_000_000 // BATCH


def get_config() -> TrainConfig:
    """The recipe."""
    model = blip("base", stack={"dtype": "bfloat16", "remat": "cheap"})
    return TrainConfig(
        task=BLIPPretraining(model=model, queue=57_600, ramp=2 * EPOCH, negatives=90),
        init=InitConfig(source="facebook/deit-base-patch16-224"),
        steps=EPOCHS * EPOCH,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=BATCH, workers=32,
            image=ImageConfig(size=224, scale=(0.2, 1.0), eval_crop="squash"),
            tokenizer=TokenizerConfig(kind="bert", file="vocab.txt", context_length=30)),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="exponential", final=0.9**EPOCHS, warmup=3_000,
                                  weight_decay=0.05, decay="", clip=None),
        mesh=MeshConfig(fsdp=8),
        evals=(Retrieval(pool=1000, captions="first"), Reranking(pool=1000, captions="first")),
        eval_every=EPOCH, log_every=50)
