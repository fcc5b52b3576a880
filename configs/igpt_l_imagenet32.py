"""iGPT-L pre-trained on ImageNet at 32 x 32 (Chen et al. 2020).

    python run_train.py --config igpt_l_imagenet32 --workdir runs/igpt_l

Published: 2.0466 nats per pixel on the images of ILSVRC 2012's validation set, by the released weights; we have not
run it. 1,362M parameters; 2,500 V100-days. From the paper: Adam with b2 = 0.95, no weight decay, no dropout, batch
128, one million steps, warm-up over one epoch, cosine to 0. The learning rate is the paper's. The paper crops a
random square after resizing the shorter side, as we recall; here it is a random square of 60 to 100 % of the area.
The palette is fitted to the training images; `--init.from openai/imagegpt-large --init.skip '.*'` takes the published
one. It needs `imagenet2012` prepared by TFDS as ArrayRecord.

Plan on v5e:4x8 (32 chips): fits in 3.13 GiB of 15.75 GiB per chip, 231 images/s and 34% of peak by XLA's estimate
(libtpu 0.0.42.1).
"""

from jaxmm.config import DataConfig, ImageConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import ImageLikelihood, ImageSamples
from jaxmm.models.igpt import igpt
from jaxmm.tasks.generative_pretraining import GenerativePretraining


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = igpt("L", stack={"dtype": "bfloat16", "remat": "full"})
    return TrainConfig(
        task=GenerativePretraining(model=model),
        steps=1_000_000,
        data=DataConfig(train="tfds:imagenet2012:train[:96%]", val="tfds:imagenet2012:validation", batch_size=128,
                        workers=8, image=ImageConfig(size=32, scale=(0.6, 1.0), ratio=(1.0, 1.0), flip=False)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=9_600, b2=0.95),
        mesh=MeshConfig(data=1, fsdp=32),
        evals=(ImageLikelihood(batch_size=128), ImageSamples()),
        eval_every=50_000, log_every=100)
