"""iGPT on generated scenes of coloured shapes: 16 x 16 pixels of 24 colours, row by row.

    python run_train.py --config igpt_scenes

"""

from jaxmm.config import DataConfig, ImageConfig, OptimizerConfig, TrainConfig
from jaxmm.evals import ImageLikelihood, ImageSamples, LayerProbes
from jaxmm.models.igpt import IGPTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.generative_pretraining import GenerativePretraining

DEPTH = 6


def get_config() -> TrainConfig:
    """Return the recipe."""
    model = IGPTConfig(
        transformer=TransformerConfig(width=96, depth=DEPTH, heads=4, mlp_dim=384, eps=1e-5, activation="quick_gelu",
                                      init="igpt"),
        image_size=16, colors=24)
    return TrainConfig(
        task=GenerativePretraining(model=model),
        steps=400,
        data=DataConfig(train="scenes:train", val="scenes:val", batch_size=32,
                        image=ImageConfig(size=16, train_crop="squash", eval_crop="squash", flip=True)),
        optimizer=OptimizerConfig(name="muon", momentum=0.95, learning_rate=2e-3, warmup=0.1, b2=0.95),
        evals=(ImageLikelihood(), ImageSamples(graded=100),
               LayerProbes(layers=tuple(range(DEPTH)), train="shapes:train", source="shapes:val", prefix="shapes")),
        eval_every=100, log_every=50)
