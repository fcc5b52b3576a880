"""A plain ViT with 2 x 2 patches on CIFAR-10, to compare with `configs/attention_conv_cifar10.py`.

    python run_train.py --config configs/vit_cifar10_patch2.py --workdir runs/vit_patch2

The same patches, width, depth, data and number of steps, and about as many parameters (11.7 M); what differs is the
layer: pre-norm, attention by content with values of each head's own, learned positions, and AdamW instead of SGD. There
is no published result. Data as in `configs/attention_conv_cifar10.py`.
"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import AttentionCenters, TopKAccuracy
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.pixels import Pixels
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.image_classification import Classification

EPOCHS, BATCH, IMAGES = 300, 100, 50_000


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = ViTConfig(
        transformer=TransformerConfig(width=400, depth=6, heads=8, mlp_dim=1600, dropout=0.1),
        image_size=32, patch=2, pool="gap", class_token=False, classes=10)
    return TrainConfig(
        task=Classification(model=model, pixels=Pixels(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))),
        steps=EPOCHS * IMAGES // BATCH,
        data=DataConfig(train="tfds:cifar10:train", val="tfds:cifar10:test", batch_size=BATCH,
                        image=ImageConfig(size=32, train_crop="pad")),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, warmup=0.05),
        evals=(TopKAccuracy(), AttentionCenters()),
        eval_every=10 * IMAGES // BATCH, log_every=100)
