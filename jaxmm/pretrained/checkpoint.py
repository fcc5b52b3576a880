"""What a source of weights is understood to be, whatever family it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxmm.config import ImageConfig
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.embeddings import Resize
from jaxmm.nn.pixels import Pixels
from jaxmm.pretrained.io.files import FileError, Tensors
from jaxmm.pretrained.table import Row
from jaxmm.pretrained.tokenizer import Words
from jaxmm.task import Task
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.tasks.image_classification import Classification
from jaxmm.tasks.pair_classification import PairClassification
from jaxmm.tasks.question_answering import QuestionAnswering

BLIP_LENGTH = 40
"""Tokens of a text in BLIP's fine-tuning for captions and matching, at most."""
QUESTION_LENGTH = 35
"""Tokens of a question, likewise."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's configuration, where its arrays lie, and how it wants its pictures and words."""

    family: str
    """The format's name, as `jaxmm.load` and `save` use it."""
    config: ViTConfig | CLIPConfig | BLIPConfig
    rows: list[Row] = field(repr=False)
    image: ImageConfig
    pixels: Pixels
    words: Words | None = None
    """How texts are read; None: there are none."""
    labels: tuple[str, ...] | None = None
    """Names of the classes that a head tells apart."""
    ignore: tuple[str, ...] = ()
    """Regular expressions of keys that hold nothing of the model."""
    notes: tuple[str, ...] = ()
    """What a user should know of this checkpoint's traps, and what was used."""

    @property
    def task(self) -> Task:
        """The objective that such a model is trained with, and whose `predict` it offers."""
        if isinstance(self.config, CLIPConfig):
            kind = "softmax" if self.config.logit_bias is None else "sigmoid"
            return ContrastiveLearning(model=self.config, pixels=self.pixels, kind=kind)
        if isinstance(self.config, BLIPConfig):
            task = (PairClassification if self.config.pair else QuestionAnswering if self.config.answer else
                    BLIPPretraining if self.config.text.encoder else Captioning)
            return task(model=self.config, pixels=self.pixels)
        return Classification(model=self.config, pixels=self.pixels)

    @property
    def context_length(self) -> int:
        """Tokens that texts are cut and padded to."""
        text = self.config.text
        if not isinstance(text, MedConfig):
            return text.context_length
        return min(text.positions, QUESTION_LENGTH if self.config.answer else BLIP_LENGTH)


RESIZES: dict[str, Resize] = {"transformers": "bicubic", "npz": "linear"}
"""How families resize position tables; the others as timm, with antialiasing."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source of weights, understood and ready to be read; no array has been."""

    name: str
    """As the user called it."""
    family: str
    task: Task
    image: ImageConfig
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    read: Callable[[Any], Any] = field(repr=False)
    """Parameters, as `ShapeDtypeStruct`s ask for them. Raises `FileError`, which lists all that does not fit."""
    tensors: Tensors | None = field(default=None, repr=False)
    """What the file holds; None: it is the checkpoint of a run."""

    @property
    def resize(self) -> Resize:
        """How this family resizes position tables."""
        return RESIZES.get(self.family, "bicubic-antialias")


def known(table: Mapping[Any, Any], value: Any, name: str) -> Any:
    """`table[value]`; raises `FileError` naming the field `name`, the value and what is supported."""
    if value not in table:
        raise FileError(f"{name} is {value!r}; supported are {', '.join(map(str, table))}")
    return table[value]


def unsupported(config: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises `FileError` naming every field of `config` that asks for what no model of ours does."""
    odd = [f"{name} = {config[name]!r}" for name, value in wanted.items() if config.get(name, value) != value]
    if odd:
        raise FileError(f"{where} asks for what is not supported: {', '.join(odd)}")
