"""jaxmm: models that connect pictures and words, in JAX."""

from jaxmm.config import ConfigError, TrainConfig
from jaxmm.data.sources import DataError, open_source
from jaxmm.models.clip import CLIP, CLIPConfig, TextConfig, clip, siglip
from jaxmm.models.vit import ViT, ViTConfig, vit
from jaxmm.tasks.classify import Classify
from jaxmm.tasks.contrastive import Contrastive
from jaxmm.training.loop import TrainError, train
from jaxmm.training.step import train_step

__all__ = [
    "CLIP", "CLIPConfig", "Classify", "ConfigError", "Contrastive", "DataError", "TextConfig", "TrainConfig",
    "TrainError", "ViT", "ViTConfig", "clip", "open_source", "siglip", "train", "train_step", "vit",
]
