"""iGPT on scikit-learn's 1,797 scanned digits: 8 x 8 pixels of 16 grey levels, row by row.

    python run_train.py --config igpt_digits

"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import ImageLikelihood, ImageSamples, LayerProbes
from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.generative_pretraining import GenerativePretraining

DEPTH = 8


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = IGPTConfig(
        transformer=TransformerConfig(width=96, depth=DEPTH, heads=4, mlp_dim=384, eps=1e-5, activation="quick_gelu",
                                      init="igpt"),
        image_size=8, colors=16)
    return TrainConfig(
        task=GenerativePretraining(model=model),
        steps=400,
        data=DataConfig(train="digits:train", val="digits:test", batch_size=64,
                        image=ImageConfig(size=8, train_crop="pad", eval_crop="squash", flip=False)),
        optimizer=OptimizerConfig(name="muon", momentum=0.95, learning_rate=2e-3, warmup=0.1, b2=0.95),
        evals=(ImageLikelihood(), LayerProbes(layers=tuple(range(DEPTH))), ImageSamples()),
        eval_every=100, log_every=50)
