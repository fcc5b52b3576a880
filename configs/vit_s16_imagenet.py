"""ViT-S/16 on ImageNet-1k: "Better plain ViT baselines" (Beyer et al. 2022).

    python run_train.py --config configs/vit_s16_imagenet.py --workdir runs/s16

Published result: 76.5 % top-1 after 90 epochs, in 6 to 7 hours on a TPU v3-8. It needs `imagenet2012` prepared by TFDS
as ArrayRecord. big_vision's weight decay of 1e-4 follows the schedule but not the peak learning rate, which makes it
AdamW's 0.1 here.

Plan on v5e:2x4 (8 chips): fits in 9.74 GiB of 15.75 GiB per chip, 11,430 images/s and 20% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import TopKAccuracy
from jaxmm.models.vit import vit
from jaxmm.tasks.image_classification import Classification

EPOCHS, BATCH, IMAGES = 90, 1024, 1_268_355  # train[:99%] of 1,281,167


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = vit("S/16", pool="gap", class_token=False, positions="sincos", pre_logits=384,
                stack={"activation": "gelu_tanh", "dtype": "bfloat16"})
    return TrainConfig(
        task=Classification(model=model, mixup=0.2),
        steps=EPOCHS * IMAGES // BATCH,
        data=DataConfig(
            train="tfds:imagenet2012:train[:99%]", val="tfds:imagenet2012:validation", batch_size=BATCH, workers=16,
            image=ImageConfig(scale=(0.05, 1.0), randaugment_layers=2, randaugment_magnitude=10,
                              eval_resize=256 / 224)),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, decay="/kernel$", warmup=10_000,
                                  moment_dtype="bfloat16"),
        evals=(TopKAccuracy(batch_size=1024),),
        eval_every=5_000, log_every=50)
