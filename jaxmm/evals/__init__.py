"""Evaluators, one per file: frozen dataclasses derived from `jaxmm.config.Evaluator`."""

from jaxmm.evals.accuracy import TopKAccuracy
from jaxmm.evals.attention_centers import AttentionCenters
from jaxmm.evals.caption_choice import CaptionChoice
from jaxmm.evals.captions import Captions
from jaxmm.evals.context import (
    CaptionExample,
    Drawing,
    EvalContext,
    ImageGrid,
    PredictionExample,
    RetrievalExample,
    Retrieved,
)
from jaxmm.evals.image_likelihood import ImageLikelihood
from jaxmm.evals.image_samples import ImageSamples
from jaxmm.evals.knn import KNN
from jaxmm.evals.layer_probes import LayerProbes
from jaxmm.evals.probe import LinearProbe
from jaxmm.evals.reranking import Reranking
from jaxmm.evals.retrieval import Retrieval
from jaxmm.evals.vqa_accuracy import VQAAccuracy
from jaxmm.evals.zero_shot import ZeroShot

__all__ = [
           "KNN",
           "AttentionCenters",
           "CaptionChoice",
           "CaptionExample",
           "Captions",
           "Drawing",
           "EvalContext",
           "ImageGrid",
           "ImageLikelihood",
           "ImageSamples",
           "LayerProbes",
           "LinearProbe",
           "PredictionExample",
           "Reranking",
           "Retrieval",
           "RetrievalExample",
           "Retrieved",
           "TopKAccuracy",
           "VQAAccuracy",
           "ZeroShot",
]
