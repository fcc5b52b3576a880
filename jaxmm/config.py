"""The configuration of a run: frozen, keyword-only, validated dataclasses, written to the workdir as JSON.

A recipe (`configs/*.py`) is a file with `get_config() -> TrainConfig`; the command line overrides any field by its
dotted name. Invalid values are errors here, before anything compiles.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jaxmm.task import Task
from jaxmm.validation import ConfigError, check_patterns, check_types, require


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing of images of any size to squares of `size` x `size` RGB bytes."""

    size: int = 224
    """Side of the square in pixels."""
    train_crop: Literal["random", "pad", "center", "squash"] = "random"
    """Crop in training. random: random resized crop (Inception); pad: shift by up to an eighth of the side, as for
    CIFAR; center: the evaluation crop; squash: resize both sides, no crop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width over height) of a random crop."""
    flip: bool = True
    """Flip half of the training images horizontally. Not for images whose left and right matter."""
    randaugment_layers: int = 0
    """RandAugment: number of random operations per image (0: none)."""
    randaugment_magnitude: float = 10.0
    """RandAugment: strength on big_vision's scale, on which 10 is the paper's strongest; more is allowed."""
    eval_crop: Literal["center", "center_floor", "squash"] = "center"
    """Crop in evaluation. center: shorter side to `eval_resize` x `size`, then the central square, with odd margins
    divided like torchvision (OpenAI, open_clip, timm); center_floor: like transformers; squash: resize both sides."""
    eval_resize: float = 1.0
    """Shorter side (squash: both sides) before the central crop, as a multiple of `size` (ImageNet's usual 256/224 is
    1.143)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of resized images, with Pillow's antialiasing."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "data.image")
        require(self.size > 0, "data.image.size", self.size, "a positive number of pixels")
        low, high = self.scale
        require(0 < low <= high <= 1, "data.image.scale", self.scale, "0 < from <= to <= 1")
        low, high = self.ratio
        require(0 < low <= high, "data.image.ratio", self.ratio, "0 < from <= to")
        require(self.randaugment_layers >= 0, "data.image.randaugment_layers", self.randaugment_layers, ">= 0")
        require(0 <= self.randaugment_magnitude <= 30, "data.image.randaugment_magnitude",
                self.randaugment_magnitude, "0 to 30")
        require(self.eval_resize >= 1, "data.image.eval_resize", self.eval_resize, ">= 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The text tokenizer: from published files, or trained on the text of the training source."""

    kind: Literal["train-wordpiece", "train-bpe", "clip", "bert", "file"] = "train-wordpiece"
    """Kind of tokenizer. clip: OpenAI's byte-pair encoding; bert: WordPiece from a `vocab.txt`; file: any
    `tokenizer.json`."""
    file: str | None = None
    """Vocabulary. clip: `bpe_simple_vocab_16e6.txt.gz` or `tokenizer.json` or a folder with `vocab.json` and
    `merges.txt`; bert: `vocab.txt`; file: `tokenizer.json`."""
    vocab_size: int = 4096
    """Maximum vocabulary size if the tokenizer is trained, including special tokens."""
    context_length: int = 77
    """Number of tokens that texts are cut or padded to, including begin and end tokens."""
    answer_length: int = 10
    """Number of tokens that answers to questions are cut or padded to, including begin and end tokens."""

    def __post_init__(self):
        """Check that published kinds name a file."""
        check_types(self, "data.tokenizer")
        for name in ("context_length", "answer_length"):
            require(getattr(self, name) >= 3, f"data.tokenizer.{name}", getattr(self, name), "3 or more")
        require(self.vocab_size >= 16, "data.tokenizer.vocab_size", self.vocab_size, "16 or more")
        if not self.kind.startswith("train-"):
            require(self.file is not None, "data.tokenizer.file", self.file, f"a path, for kind {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data. A source is one string: `scenes:train`, `digits:train`, `folder:DIR`,
    `captions:FILE.jsonl`, `coco:FILE.json[:SPLIT]`, `nlvr:FILE.json`, `tars:GLOB`, `parquet:GLOB`, `shapes:train`,
    `tfds:NAME:SPLIT`, `vqa:PLACE`."""

    train: str = "scenes:train"
    """Source of the training images."""
    val: str | None = "scenes:val"
    """Source of the held-out images; None: no evaluation."""
    batch_size: int = 64
    """Images per step, over all devices and hosts."""
    questions: int = 1
    """Questions per image, if the source has questions; the image is encoded once. From 2 on the others are drawn from
    the questions about the same image."""
    workers: int = 0
    """Processes that decode images (0: threads of this process). The order of the data does not depend on it."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. Default: `TFDS_DATA_DIR`, else TFDS's default."""
    max_bad: float = 0.05
    """Share of unreadable records above which a run stops."""
    image: ImageConfig = field(default_factory=ImageConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "data")
        for name in ("batch_size", "questions"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "a positive number")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Initial parameters: from a trained model, or random."""

    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A trained model, as `jaxmm.load` takes it: a Hugging Face repository, a folder, a file, the workdir of a run. Its
    architecture, mean and std, and vocabulary replace the recipe's; position tables are resized to `data.image.size`,
    and heads start at zero. None: all parameters are random."""
    revision: str | None = None
    """Revision of the Hugging Face repository, or the step of a workdir's checkpoint."""
    architecture: str | None = None
    """Architecture of an open_clip checkpoint without a configuration, as `jaxmm.load` takes it, such as ViT-H-14."""
    weights: Literal["params", "average"] | None = None
    """Raw or averaged (EMA) weights of a file with both; None: the raw ones."""
    context_length: int | None = None
    """Tokens of a text. The text tower's position table is resized to it; None: as in the trained model."""
    skip: tuple[str, ...] = ()
    """Regular expressions of parameter paths that are initialised randomly anyway."""

    def __post_init__(self):
        """Check regular expressions."""
        check_types(self, "init")
        require(self.context_length is None or self.context_length > 2, "init.context_length", self.context_length,
                "more than 2, or None")
        check_patterns("init.skip", self.skip)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its schedule and per-parameter rules; `training.optimizer` builds one optax chain from it."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """Optimizer. muon: Muon for the matrices inside the layers, AdamW for the rest; a small ViT learns from little data
    in a fraction of AdamW's steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "exponential", "rsqrt", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    """Linear warm-up from 0: a count of steps, or below 1 a share of all steps."""
    cooldown: float = 0.0
    """Linear decay to 0 at the end (for rsqrt and constant): a count of steps, or below 1 a share of all steps."""
    final: float = 0.0
    """Final learning rate of cosine, linear and exponential as a share of the peak; exponential: above 0."""
    weight_decay: float = 0.0
    """Decoupled, multiplied by the learning rate (AdamW of torch and optax)."""
    decay: str = r"/(kernel|embedding)$"
    """Regular expression of the parameter paths with weight decay; the rest (biases, norms, scales, class tokens,
    position tables) has none."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    """Momentum of SGD and Muon."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment."""
    clip: float | None = 1.0
    """Maximum global norm of the gradient; None: no clipping."""
    layer_decay: float | None = None
    """Layer-wise learning-rate decay: the factor between a layer's learning rate and that of the next (BEiT, MAE)."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(regular expression, factor) pairs for the learning rate; the first that matches a path is used."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of frozen parameter paths: no update, no moments, no decay."""
    average: float | None = None
    """Decay of an exponential moving average of the parameters, for evaluators; None: no average."""

    def __post_init__(self):
        """Check ranges and regular expressions."""
        check_types(self, "optimizer")
        require(self.learning_rate >= 0, "optimizer.learning_rate", self.learning_rate, "0 or more")
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 or more")
        require(self.cooldown >= 0, "optimizer.cooldown", self.cooldown, "0 or more")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.final > 0 or self.schedule != "exponential", "optimizer.final", self.final,
                "above 0 for the exponential schedule")
        require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "a positive norm or None")
        for name in ("layer_decay", "average"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"optimizer.{name}", value, "above 0, at most 1, or None")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "0 or more, below 1")
        check_patterns("optimizer.decay", (self.decay,))
        check_patterns("optimizer.freeze", self.freeze)
        check_patterns("optimizer.multipliers", [pattern for pattern, _ in self.multipliers])


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh. The product of the axes is the number of devices used."""

    data: int = -1
    """Data parallelism: copies of the model; -1: all devices that the other axes leave."""
    fsdp: int = 1
    """FSDP: shards of parameters and optimizer state; the batch is sharded over them too."""
    tensor: int = 1
    """Tensor parallelism: shards of the heads and MLP hidden units of a layer."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "mesh")
        require(self.data > 0 or self.data == -1, "mesh.data", self.data, "a positive number, or -1 for the rest")
        for name in ("fsdp", "tensor"):
            require(getattr(self, name) > 0, f"mesh.{name}", getattr(self, name), "a positive number")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which ones are kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    best: str | None = None
    """A metric such as `val/top1`: the checkpoint where it is highest (a loss: lowest) is kept too."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "checkpoint")
        require(self.every > 0, "checkpoint.every", self.every, "a positive number of steps")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a positive number")


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Base of the evaluators: frozen dataclasses that measure a model on a source.

    A subclass sets `metric_names` (or overrides `names`) and overrides `measure`, and `validate` if it cannot run on
    every source. `context` is a `jaxmm.evals.context.EvalContext`.
    """

    weights: Literal["params", "average"] = "params"
    """Weights that are measured; average: the moving average that `optimizer.average` asks for."""
    source: str | None = None
    """Source that is measured on; None: `data.val`."""
    batch_size: int = 256
    """Images or texts per batch, over all devices; rounded up to a multiple of the devices."""
    prefix: str = "val"
    """First part of the metrics' names."""
    metric_names: ClassVar[tuple[str, ...]] = ()
    """Names of the metrics, without the prefix, if they do not depend on the source."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Capabilities that the task must have, in the words of `jaxmm.task.capabilities`; "A or B" asks for one of two."""
    reads_text: ClassVar[bool] = False
    """True if a tokenizer is needed."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "evals")
        require(self.batch_size > 0, "evals.batch_size", self.batch_size, "a positive number")

    def names(self, source: Any) -> tuple[str, ...]:
        """Return the names of the metrics on `source`, without the prefix."""
        return self.metric_names

    def measure(self, context: Any, source: Any) -> Iterable[float]:
        """Return the values of the metrics on `source`, in the order of `names`.

        Examples for the report are added to `context.examples`.
        """
        raise NotImplementedError

    def validate(self, context: Any, source: Any) -> None:
        """Raise `ConfigError` if `source` or the run lacks what this evaluator needs besides `needs`."""

    def check(self, context: Any) -> Any:
        """Return the source that is measured on. Raise `ConfigError` if this evaluator cannot run in `context`."""
        source = context.check(self)
        self.validate(context, source)
        return source

    def metrics(self, context: Any) -> tuple[str, ...]:
        """Return the names of the metrics that `run` yields."""
        return tuple(f"{self.prefix}/{name}" for name in self.names(context.source_of(self)))

    def run(self, context: Any) -> Iterator[tuple[str, float]]:
        """Yield the names and values of the metrics."""
        source = self.check(context)
        for name, value in zip(self.names(source), self.measure(context, source), strict=True):
            yield f"{self.prefix}/{name}", float(value)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    task: Task
    """The model and its objective."""
    steps: int = 1000
    """Optimizer steps of the run."""
    seed: int = 0
    """Seed of everything random: parameters, order of the data, augmentation, dropout."""
    microbatches: int = 1
    """Number of sequential parts of each batch: less memory, the same gradient."""
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: tuple[Evaluator, ...] = ()
    """Evaluators that run every `eval_every` steps and at the end."""
    log_every: int = 20
    """Steps between lines of `metrics.jsonl`."""
    eval_every: int | None = None
    """Steps between evaluations; None: only at the end."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a loss or gradient that is not finite: stop the run, or skip the step and keep the state."""
    max_skips: int = 10
    """Number of consecutive skipped steps after which the run stops."""

    def __post_init__(self):
        """Check ranges, and that the microbatches divide the batch."""
        check_types(self)
        for name in ("steps", "microbatches", "log_every", "max_skips"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.eval_every is None or self.eval_every > 0, "eval_every", self.eval_every, "positive, or None")
        require(self.data.batch_size % self.microbatches == 0, "microbatches", self.microbatches,
                f"a divisor of data.batch_size = {self.data.batch_size}")


RENAMED = {
    "jaxmm.models.med.MedConfig": "jaxmm.models.med_config.MedConfig",
    "jaxmm.capfilt.select.Rule": "jaxmm.capfilt.selection.Rule",
    "jaxmm.generate.Decoding": "jaxmm.inference.generate.Decoding",
    "jaxmm.tasks.blip.BLIPPretraining": "jaxmm.tasks.blip_pretraining.BLIPPretraining",
    "jaxmm.tasks.caption.Captioning": "jaxmm.tasks.image_captioning.Captioning",
    "jaxmm.tasks.classify.Classify": "jaxmm.tasks.image_classification.Classification",
    "jaxmm.tasks.contrastive.Contrastive": "jaxmm.tasks.contrastive_learning.ContrastiveLearning",
    "jaxmm.tasks.nlvr.NLVR": "jaxmm.tasks.pair_classification.PairClassification",
    "jaxmm.tasks.vqa.VQA": "jaxmm.tasks.question_answering.QuestionAnswering",
    "jaxmm.evals.classification.Classification": "jaxmm.evals.accuracy.TopKAccuracy",
    "jaxmm.evals.vqa.VQAAccuracy": "jaxmm.evals.vqa_accuracy.VQAAccuracy",
}
"""Current names of types in configurations that older versions wrote."""
RECIPE = "recipe_"
"""Prefix of the module names of imported recipe files."""


def to_dict(value: Any) -> Any:
    """Convert a configuration to plain JSON values; a dataclass becomes its fields and a `type`."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}"} | fields
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def from_dict(value: Any, file: Path | str | None = None) -> Any:
    """Return the configuration that `to_dict` wrote; `file`, where it was read, is named in messages.

    Only frozen dataclasses are built: jaxmm's own, and those of modules that are imported already. Nothing else is
    imported because a file says so. Raises `ConfigError` for other types and for unknown fields.
    """
    if isinstance(value, list):
        return tuple(from_dict(item, file) for item in value)
    if not isinstance(value, dict):
        return value
    cls = _find_type(value.get("type"), "" if file is None else f"{file}: ")
    fields = {name: from_dict(item, file) for name, item in value.items() if name != "type"}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ConfigError(f"{'' if file is None else f'{file}: '}{value['type']} has no field {sorted(unknown)}")
    return cls(**fields)


def _find_type(name: Any, where: str) -> type:
    """Return the frozen dataclass called `name`, such as "jaxmm.config.MeshConfig"."""
    module, _, attribute = RENAMED.get(str(name), str(name)).rpartition(".")
    if module.startswith("jaxmm."):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    elif module and module not in sys.modules:
        how = (f"load that recipe first: jaxmm.recipes.load_recipe(Path(\".../{module.removeprefix(RECIPE)}.py\"))"
               if module.startswith(RECIPE) else f"import {module} first")
        raise ConfigError(f"{where}type is {name!r}, and the module {module} is not imported; {how}")
    cls = getattr(sys.modules.get(module), attribute, None) if module else None
    usable = isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    require(usable and cls.__module__ == module, f"{where}type", name,
            "a frozen dataclass at the top level of its module" + (
                "; run what defines it first" if module == "__main__" else ""))
    return cls


def save_config(config: TrainConfig, path: Path, **notes: Any) -> None:
    """Write `config` and `notes` (versions, devices) to `path` as JSON."""
    path.write_text(json.dumps({"config": to_dict(config)} | notes, indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote."""
    return from_dict(json.loads(path.read_text())["config"], path)


def with_current_names(value: Any) -> Any:
    """Replace the types that older versions wrote by their names of today, in plain JSON values."""
    return _with_types(value, RENAMED)


def with_first_names(value: Any) -> Any:
    """Replace types by the names that the oldest version wrote, in plain JSON values, so that digests stay the same."""
    return _with_types(value, {new: old for old, new in reversed(RENAMED.items())})


def _with_types(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_with_types(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_types(item, names) for key, item in value.items()}
    return value | {"type": names.get(value["type"], value["type"])} if isinstance(value.get("type"), str) else value


def differences(old: Any, new: Any, *, free: Sequence[str] = (), name: str = "") -> list[str]:
    """List the differences between two JSON values, one line per field, except for the fields in `free`."""
    if name in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted(set(old) | set(new))
                for line in differences(old.get(key), new.get(key), free=free, name=f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]
