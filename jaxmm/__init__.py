"""jaxmm: models that connect images and text, in JAX.

Names are imported when they are first used, so that `import jaxmm` takes no time and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, the same names as in `_MODULES`
    from jaxmm.checkpoints import CheckpointError as CheckpointError
    from jaxmm.config import CheckpointConfig as CheckpointConfig
    from jaxmm.config import DataConfig as DataConfig
    from jaxmm.config import Evaluator as Evaluator
    from jaxmm.config import ImageConfig as ImageConfig
    from jaxmm.config import InitConfig as InitConfig
    from jaxmm.config import MeshConfig as MeshConfig
    from jaxmm.config import OptimizerConfig as OptimizerConfig
    from jaxmm.config import TokenizerConfig as TokenizerConfig
    from jaxmm.config import TrainConfig as TrainConfig
    from jaxmm.data.base import DataError as DataError
    from jaxmm.data.base import Source as Source
    from jaxmm.data.sources.registry import open_source as open_source
    from jaxmm.evals import KNN as KNN
    from jaxmm.evals import AttentionCenters as AttentionCenters
    from jaxmm.evals import CaptionChoice as CaptionChoice
    from jaxmm.evals import Captions as Captions
    from jaxmm.evals import EvalContext as EvalContext
    from jaxmm.evals import ImageLikelihood as ImageLikelihood
    from jaxmm.evals import ImageSamples as ImageSamples
    from jaxmm.evals import LayerProbes as LayerProbes
    from jaxmm.evals import LinearProbe as LinearProbe
    from jaxmm.evals import Reranking as Reranking
    from jaxmm.evals import Retrieval as Retrieval
    from jaxmm.evals import TopKAccuracy as TopKAccuracy
    from jaxmm.evals import VQAAccuracy as VQAAccuracy
    from jaxmm.evals import ZeroShot as ZeroShot
    from jaxmm.evals.evaluation import evaluate as evaluate
    from jaxmm.inference.generate import Decoding as Decoding
    from jaxmm.inference.model import Model as Model
    from jaxmm.inference.model import load as load
    from jaxmm.models.attention_conv import AttentionConv as AttentionConv
    from jaxmm.models.attention_conv import AttentionConvConfig as AttentionConvConfig
    from jaxmm.models.attention_conv import convolution_params as convolution_params
    from jaxmm.models.blip import BLIP as BLIP
    from jaxmm.models.blip import BLIPConfig as BLIPConfig
    from jaxmm.models.blip import blip as blip
    from jaxmm.models.clip import CLIP as CLIP
    from jaxmm.models.clip import CLIPConfig as CLIPConfig
    from jaxmm.models.clip import TextConfig as TextConfig
    from jaxmm.models.clip import clip as clip
    from jaxmm.models.clip import siglip as siglip
    from jaxmm.models.igpt import IGPT as IGPT
    from jaxmm.models.igpt import IGPTConfig as IGPTConfig
    from jaxmm.models.igpt import igpt as igpt
    from jaxmm.models.med import MedConfig as MedConfig
    from jaxmm.models.vit import ViT as ViT
    from jaxmm.models.vit import ViTConfig as ViTConfig
    from jaxmm.models.vit import vit as vit
    from jaxmm.nn.transformer import TransformerConfig as TransformerConfig
    from jaxmm.optional import MissingExtra as MissingExtra
    from jaxmm.pretrained.io.files import FileError as FileError
    from jaxmm.recipes import load_recipe as load_recipe
    from jaxmm.task import Task as Task
    from jaxmm.tasks.blip_pretraining import BLIPPretraining as BLIPPretraining
    from jaxmm.tasks.contrastive_learning import ContrastiveLearning as ContrastiveLearning
    from jaxmm.tasks.generative_classification import GenerativeClassification as GenerativeClassification
    from jaxmm.tasks.generative_pretraining import GenerativePretraining as GenerativePretraining
    from jaxmm.tasks.image_captioning import Captioning as Captioning
    from jaxmm.tasks.image_classification import Classification as Classification
    from jaxmm.tasks.pair_classification import PairClassification as PairClassification
    from jaxmm.tasks.question_answering import QuestionAnswering as QuestionAnswering
    from jaxmm.training.loop import TrainError as TrainError
    from jaxmm.training.loop import train as train
    from jaxmm.training.step import train_step as train_step
    from jaxmm.validation import ConfigError as ConfigError

_MODULES = {
    "checkpoints": "CheckpointError",
    "config": "CheckpointConfig DataConfig Evaluator ImageConfig InitConfig MeshConfig OptimizerConfig TokenizerConfig "
              "TrainConfig",
    "data.base": "DataError Source",
    "data.sources.registry": "open_source",
    "evals": "AttentionCenters CaptionChoice Captions EvalContext ImageLikelihood ImageSamples KNN LayerProbes "
             "LinearProbe Reranking Retrieval TopKAccuracy VQAAccuracy ZeroShot",
    "evals.evaluation": "evaluate",
    "inference.generate": "Decoding",
    "inference.model": "Model load",
    "models.attention_conv": "AttentionConv AttentionConvConfig convolution_params",
    "models.blip": "BLIP BLIPConfig blip",
    "models.clip": "CLIP CLIPConfig TextConfig clip siglip",
    "models.igpt": "IGPT IGPTConfig igpt",
    "models.med": "MedConfig",
    "models.vit": "ViT ViTConfig vit",
    "nn.transformer": "TransformerConfig",
    "optional": "MissingExtra",
    "pretrained.io.files": "FileError",
    "recipes": "load_recipe",
    "task": "Task",
    "tasks.blip_pretraining": "BLIPPretraining",
    "tasks.contrastive_learning": "ContrastiveLearning",
    "tasks.generative_classification": "GenerativeClassification",
    "tasks.generative_pretraining": "GenerativePretraining",
    "tasks.image_captioning": "Captioning",
    "tasks.image_classification": "Classification",
    "tasks.pair_classification": "PairClassification",
    "tasks.question_answering": "QuestionAnswering",
    "training.loop": "TrainError train",
    "training.step": "train_step",
    "validation": "ConfigError",
}
"""The public names that each module defines."""
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # type checkers report unknown names
    def __getattr__(name: str):
        """Import a public name from its module."""
        if name not in _HOME:
            raise AttributeError(f"module 'jaxmm' has no attribute {name!r}")
        return getattr(importlib.import_module(f"jaxmm.{_HOME[name]}"), name)


def __dir__():
    """Return the public names."""
    return __all__
