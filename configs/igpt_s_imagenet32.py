"""iGPT-S pre-trained on ImageNet at 32 x 32 (Chen et al. 2020).

    python run_train.py --config igpt_s_imagenet32 --workdir runs/igpt_s

Published: 2.0895 nats per pixel on the images of ILSVRC 2012's validation set, by the released weights; we have not
run it. 76M parameters. From the paper: Adam with b2 = 0.95, no weight decay, no dropout, batch 128, one million
steps, warm-up over one epoch, cosine to 0. The learning rate is recalled. The paper crops a random square after
resizing the shorter side, as we recall; here it is a random square of 60 to 100 % of the area. The palette is fitted
to the training images; `--init.from openai/imagegpt-small --init.skip '.*'` takes the published one. It needs
`imagenet2012` prepared by TFDS as ArrayRecord.

Plan on v5e:2x4 (8 chips): fits in 7.26 GiB of 15.75 GiB per chip, 424 images/s and 17% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import ImageLikelihood, ImageSamples
from jaxmm.models.igpt import igpt
from jaxmm.tasks.generative_pretraining import GenerativePretraining


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = igpt("S", stack={"dtype": "bfloat16", "remat": "cheap"})
    return TrainConfig(
        task=GenerativePretraining(model=model),
        steps=1_000_000,
        data=DataConfig(train="tfds:imagenet2012:train[:96%]", val="tfds:imagenet2012:validation", batch_size=128,
                        workers=8, image=ImageConfig(size=32, scale=(0.6, 1.0), ratio=(1.0, 1.0), flip=False)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=9_600, b2=0.95),
        evals=(ImageLikelihood(batch_size=128), ImageSamples()),
        eval_every=50_000, log_every=100)
