r"""CLIP ViT-L/14 as OpenAI trained it (Radford et al. 2021, tables 18 and 19), on your own pairs.

    python run_train.py --config configs/clip_l14.py --workdir runs/l14 --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file bpe_simple_vocab_16e6.txt.gz

OpenAI reports 75.5 % zero-shot ImageNet top-1 (76.2 % with a last epoch at 336 pixels), from 12 days on 256 V100;
open_clip needed about 50,800 A100 hours for 13 billion samples. Parameters and optimizer state are sharded over 16
chips. Where OpenAI's value is not known (the random crop), it is open_clip's. We have not run it at this scale.

Plan on v5e:16x16 (256 chips): fits in 4.98 GiB of 15.75 GiB per chip, 45,337 images/s and 47% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import clip
from jaxmm.tasks.contrastive_learning import ContrastiveLearning

BATCH = 32_768


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = clip("ViT-L-14", activation="quick_gelu", stack={"dtype": "bfloat16", "remat": "full"})
    return TrainConfig(
        task=ContrastiveLearning(model=model),
        steps=32 * 400_000_000 // BATCH,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=BATCH, workers=32,
            image=ImageConfig(scale=(0.9, 1.0), flip=False),
            tokenizer=TokenizerConfig(kind="clip", file="bpe_simple_vocab_16e6.txt.gz", context_length=77)),
        optimizer=OptimizerConfig(learning_rate=4e-4, weight_decay=0.2, warmup=2_000, b1=0.9, b2=0.98, eps=1e-6,
                                  clip=None),
        mesh=MeshConfig(fsdp=16),
        evals=(Retrieval(pool=1000, captions="first"),),
        eval_every=5_000, log_every=50)
