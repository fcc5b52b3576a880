r"""SigLIP B/16 (Zhai et al. 2023): the sigmoid loss, on your own pairs.

    python run_train.py --config configs/siglip_b16.py --workdir runs/siglip --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file tokenizer.json

The paper reports 71.0 % zero-shot ImageNet top-1 after three days on 16 TPU v4 chips, on private English pairs; the
released B/16 is better. A run from scratch takes any `tokenizer.json`; its vocabulary sets the size of the token
embedding. Learning rate, decay and batch size follow the paper's section 4. We have not run it at this scale.

Plan on v5e:16x16 (256 chips): fits in 9.00 GiB of 15.75 GiB per chip, 134,747 images/s and 37% of peak by XLA's
estimate (libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import siglip
from jaxmm.nn.pixels import INCEPTION
from jaxmm.tasks.contrastive_learning import ContrastiveLearning

BATCH = 32_768


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = siglip("B/16", vocab_size=None, stack={"dtype": "bfloat16", "remat": "mlp"})
    return TrainConfig(
        task=ContrastiveLearning(model=model, pixels=INCEPTION, kind="sigmoid"),
        steps=4_000_000_000 // BATCH,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=BATCH, workers=32,
            image=ImageConfig(flip=False, train_crop="squash", eval_crop="squash"),
            tokenizer=TokenizerConfig(kind="file", file="tokenizer.json", context_length=64)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup=10_000, b2=0.95),
        evals=(Retrieval(pool=1000, captions="first"),),
        eval_every=5_000, log_every=50)
