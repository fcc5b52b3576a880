"""jaxmm: models that connect pictures and words, in JAX.

Names are imported when they are first used, so that a process that only reads data does not load the models.
"""

import importlib

_HOMES = {
    "CLIP": "models.clip", "CLIPConfig": "models.clip", "TextConfig": "models.clip", "clip": "models.clip",
    "siglip": "models.clip", "ViT": "models.vit", "ViTConfig": "models.vit", "vit": "models.vit",
    "BLIP": "models.blip", "BLIPConfig": "models.blip", "blip": "models.blip", "Decoding": "inference.generate",
    "BLIPPretraining": "tasks.blip_pretraining", "Captioning": "tasks.image_captioning",
    "Classification": "tasks.image_classification", "ContrastiveLearning": "tasks.contrastive_learning",
    "TrainConfig": "config", "ConfigError": "config", "DataError": "data.base",
    "open_source": "data.sources.registry", "CheckpointError": "checkpoints", "TrainError": "training.loop",
    "train": "training.loop", "train_step": "training.step", "load": "inference.model", "Model": "inference.model",
    "FileError": "pretrained.io.files",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """The public name, from where it is defined."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxmm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxmm.{_HOMES[name]}"), name)


def __dir__():
    """The public names."""
    return __all__
