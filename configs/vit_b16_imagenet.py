"""ViT-B/16 on ImageNet-1k from scratch: "How to train your ViT?" (AugReg, Steiner et al. 2022), strength medium2.

    python run_train.py --config configs/vit_b16_imagenet.py --workdir runs/b16

The values are those of big_vision's vit_i1k configuration for B/16, which reports no result; we have not run it. It
needs `imagenet2012` prepared by TFDS as ArrayRecord. Weight decay as in vit_s16_imagenet.

Plan on v5e:8x8 (64 chips): fits in 11.30 GiB of 15.75 GiB per chip, 38,166 images/s and 32% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import TopKAccuracy
from jaxmm.models.vit import vit
from jaxmm.tasks.image_classification import Classification

EPOCHS, BATCH, IMAGES = 300, 4096, 1_268_355  # train[:99%] of 1,281,167


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = vit("B/16", position_class=False, positions_std=None, pre_logits=768,
                stack={"activation": "gelu_tanh", "dtype": "bfloat16"})
    return TrainConfig(
        task=Classification(model=model, mixup=0.5),
        steps=EPOCHS * IMAGES // BATCH,
        data=DataConfig(
            train="tfds:imagenet2012:train[:99%]", val="tfds:imagenet2012:validation", batch_size=BATCH, workers=16,
            image=ImageConfig(scale=(0.05, 1.0), randaugment_layers=2, randaugment_magnitude=15,
                              eval_resize=256 / 224)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, decay="/kernel$", warmup=10_000,
                                  moment_dtype="bfloat16"),
        evals=(TopKAccuracy(batch_size=1024),),
        eval_every=2_500, log_every=50)
