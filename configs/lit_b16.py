r"""Locked-image tuning (LiT, Zhai et al. 2022): train a text tower against a frozen image tower.

    python run_train.py --config configs/lit_b16.py --workdir runs/lit --data.train tfds:MY_PAIRS:train \
        --data.val tfds:MY_PAIRS:validation --data.tokenizer.file vocab.txt

Every parameter under `vision/` is frozen: no gradient is computed for it and no optimizer state is kept. The image
tower has no projection and the text tower projects to its width, as in the paper's B/16 models. The image tower is that
of `--init.from`: any ViT of width 768, by default Google's, trained on ImageNet-21k.

Plan on v5e:8x8 (64 chips): fits in 5.77 GiB of 15.75 GiB per chip, 120,236 images/s and 41% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, InitConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from jaxmm.evals import Retrieval
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.vit import transformer, vit
from jaxmm.nn.pixels import INCEPTION
from jaxmm.tasks.contrastive_learning import ContrastiveLearning


def get_config() -> TrainConfig:
    """Return the recipe."""
    stack = {"activation": "gelu_tanh", "dtype": "bfloat16"}
    text = TextConfig(transformer=transformer("B", **stack), vocab_size=None, context_length=16,
                      causal=False, pad_id=0, pool="first")
    model = CLIPConfig(vision=vit("B/16", stack=stack), text=text, embed_dim=768, vision_projection=False,
                       text_projection_bias=True)
    return TrainConfig(
        task=ContrastiveLearning(model=model, pixels=INCEPTION),
        init=InitConfig(source="google/vit-base-patch16-224-in21k"),
        steps=55_000,
        data=DataConfig(
            train="tfds:pairs:train", val="tfds:pairs:validation", batch_size=16_384, workers=32,
            image=ImageConfig(flip=False, scale=(0.5, 1.0)),
            tokenizer=TokenizerConfig(kind="bert", file="vocab.txt", context_length=16)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup=10_000, freeze=("^vision/",)),
        evals=(Retrieval(pool=1000, captions="first"),),
        eval_every=5_000, log_every=50)
