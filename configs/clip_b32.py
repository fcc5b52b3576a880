r"""CLIP ViT-B/32 as OpenAI trained it (Radford et al. 2021, tables 18 and 19), on your own pairs.

    python run_train.py --config configs/clip_b32.py --workdir runs/b32 --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file bpe_simple_vocab_16e6.txt.gz

OpenAI reports 63.2 % zero-shot ImageNet top-1 from 32 epochs over 400 million private pairs; open_clip needed about
4,600 A100 hours for 13 billion samples. Set `--steps` to 32 x your pairs / 32,768. Where OpenAI's value is not known
(the random crop), it is open_clip's. We have not run it at this scale.

Plan on v5e:16x16 (256 chips): fits in 14.11 GiB of 15.75 GiB per chip, 312,133 images/s and 27% of peak by XLA's
estimate (libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import clip
from jaxmm.tasks.contrastive_learning import ContrastiveLearning

BATCH = 32_768


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = clip("ViT-B-32", activation="quick_gelu", stack={"dtype": "bfloat16"})
    return TrainConfig(
        task=ContrastiveLearning(model=model),
        steps=32 * 400_000_000 // BATCH,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=BATCH, workers=32,
            image=ImageConfig(scale=(0.9, 1.0), flip=False),
            tokenizer=TokenizerConfig(kind="clip", file="bpe_simple_vocab_16e6.txt.gz", context_length=77)),
        optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.2, warmup=2_000, b1=0.9, b2=0.98, eps=1e-6,
                                  clip=None),
        mesh=MeshConfig(),
        evals=(Retrieval(pool=1000, captions="first"),),
        eval_every=5_000, log_every=50)
