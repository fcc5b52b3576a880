"""Self-attention as convolution on CIFAR-10 (Cordonnier, Loukas and Jaggi 2020, arXiv:1911.03584), their recipe.

    python run_train.py --config configs/attention_conv_cifar10.py --workdir runs/attention_conv

It needs `cifar10` prepared by TFDS as ArrayRecord, or one folder per class: `--data.train folder:DIR/train --data.val
folder:DIR/test`. Published accuracies, best epoch on the test set (those with a star are recalled, not checked):

| --task.model.scores   | top-1   | parameters |
| --------------------- | ------- | ---------- |
| quadratic (default)   | 93.8 %  | 12,086,844 |
| generalised_quadratic | 93.4 %* | 12,087,006 |
| learned               | 91.8 %* | 12,278,682 |
| learned_content       | 87.1 %* | 29,601,882 |
| their ResNet-18       | 93.8 %* | 11.2 M     |

torch's SGD adds its weight decay of 1e-4 before the momentum of 0.9, which makes it 1e-3 here, where decay does not
pass through the momentum. Centers and spreads of the heads are not decayed. `configs/vit_cifar10_patch2.py` is a plain
ViT on the same patches, and `configs/attention_conv_digits.py` the recipe for two cores.
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import AttentionCenters, TopKAccuracy
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.tasks.image_classification import Classification

EPOCHS, BATCH, IMAGES = 300, 100, 50_000


def get_config() -> TrainConfig:
    """Return the recipe."""
    pixels = Pixels(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    return TrainConfig(
        task=Classification(model=AttentionConvConfig(classes=10), pixels=pixels),
        steps=EPOCHS * IMAGES // BATCH,
        data=DataConfig(train="tfds:cifar10:train", val="tfds:cifar10:test", batch_size=BATCH,
                        image=ImageConfig(size=32, train_crop="pad")),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, warmup=0.05, weight_decay=1e-3, clip=None,
                                  decay=r"^(?!.*/(centers|inverse_spread)$)"),
        evals=(TopKAccuracy(), AttentionCenters()),
        eval_every=10 * IMAGES // BATCH, log_every=100)
