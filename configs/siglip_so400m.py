r"""SigLIP So400m/14 (Zhai et al. 2023; the shape of Alabdulmohsin et al. 2023), on your own pairs.

    python run_train.py --config configs/siglip_so400m.py --workdir runs/so400m --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file tokenizer.json

224 pixels, blockwise loss, parameters and optimizer state in 16 shards. Learning rate, decay and batch size follow the
paper's section 4; its pairs (WebLI) are not public. A run from scratch takes any `tokenizer.json`; its vocabulary sets
the size of the token embedding. We have not run it at this scale.

Plan on v5e:16x16 (256 chips): fits in 6.68 GiB of 15.75 GiB per chip, 29,554 images/s and 48% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, MeshConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import siglip
from jaxmm.nn.pixels import INCEPTION
from jaxmm.tasks.contrastive_learning import ContrastiveLearning

BATCH = 32_768


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = siglip("So400m/14", vocab_size=None, stack={"dtype": "bfloat16", "remat": "full"})
    return TrainConfig(
        task=ContrastiveLearning(model=model, pixels=INCEPTION, kind="sigmoid", tile=1024),
        steps=9_000_000_000 // BATCH,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=BATCH, workers=32,
            image=ImageConfig(flip=False, train_crop="squash", eval_crop="squash"),
            tokenizer=TokenizerConfig(kind="file", file="tokenizer.json", context_length=64)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup=10_000, b2=0.95),
        mesh=MeshConfig(fsdp=16),
        evals=(Retrieval(pool=1000, captions="first"),),
        eval_every=5_000, log_every=50)
