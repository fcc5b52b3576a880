"""The configuration of a run, as a recipe writes it: frozen, keyword-only, validated dataclasses.

A recipe (`configs/*.py`) is a file with `get_config() -> TrainConfig`; the command line overrides any field by its
dotted name. Invalid values are errors here, before anything compiles.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from jaxmm.task import Task
from jaxmm.validation import (
    BELOW_ONE,
    POSITIVE,
    UP_TO_ONE,
    Limit,
    at_least,
    check_patterns,
    check_types,
    require,
)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing of images of any size to squares of `size` x `size` RGB bytes."""

    size: Annotated[int, POSITIVE] = 224
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
    randaugment_layers: Annotated[int, at_least(0)] = 0
    """RandAugment: number of random operations per image (0: none)."""
    randaugment_magnitude: Annotated[float, Limit("0 to 30", lambda value: 0 <= value <= 30)] = 10.0
    """RandAugment: strength on big_vision's scale, on which 10 is the paper's strongest; more is allowed."""
    eval_crop: Literal["center", "center_floor", "squash"] = "center"
    """Crop in evaluation. center: shorter side to `eval_resize` x `size`, then the central square, with odd margins
    divided like torchvision (OpenAI, open_clip, timm); center_floor: like transformers; squash: resize both sides."""
    eval_resize: Annotated[float, at_least(1)] = 1.0
    """Shorter side (squash: both sides) before the central crop, as a multiple of `size` (ImageNet's usual 256/224 is
    1.143)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of resized images, with Pillow's antialiasing."""

    def __post_init__(self):
        """Check ranges."""
        check_types(self, "data.image")
        low, high = self.scale
        require(0 < low <= high <= 1, "data.image.scale", self.scale, "0 < from <= to <= 1")
        low, high = self.ratio
        require(0 < low <= high, "data.image.ratio", self.ratio, "0 < from <= to")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The text tokenizer: from published files, or trained on the text of the training source."""

    kind: Literal["train-wordpiece", "train-bpe", "clip", "bert", "file"] = "train-wordpiece"
    """Kind of tokenizer. clip: OpenAI's byte-pair encoding; bert: WordPiece from a `vocab.txt`; file: any
    `tokenizer.json`."""
    file: str | None = None
    """Vocabulary. clip: `bpe_simple_vocab_16e6.txt.gz` or `tokenizer.json` or a folder with `vocab.json` and
    `merges.txt`; bert: `vocab.txt`; file: `tokenizer.json`."""
    vocab_size: Annotated[int, at_least(16)] = 4096
    """Maximum vocabulary size if the tokenizer is trained, including special tokens."""
    context_length: Annotated[int, at_least(3)] = 77
    """Number of tokens that texts are cut or padded to, including begin and end tokens."""
    answer_length: Annotated[int, at_least(3)] = 10
    """Number of tokens that answers to questions are cut or padded to, including begin and end tokens."""

    def __post_init__(self):
        """Check that published kinds name a file."""
        check_types(self, "data.tokenizer")
        if not self.kind.startswith("train-"):
            require(self.file is not None, "data.tokenizer.file", self.file, f"a path, for kind {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data. A source is one string: `scenes:train`, `digits:train`, `folder:DIR`,
    `captions:FILE.jsonl`, `coco:FILE.json[:SPLIT]`, `nlvr:FILE.json`, `tars:GLOB`, `parquet:GLOB`, `shapes:train`,
    `tfds:NAME:SPLIT`, `vqa:FILE`; docs/data.md has them all."""

    train: str = "scenes:train"
    """Source of the training images."""
    val: str | None = "scenes:val"
    """Source of the held-out images; None: no evaluation."""
    batch_size: Annotated[int, POSITIVE] = 64
    """Images per step, over all devices and hosts."""
    captions: Annotated[int, POSITIVE] = 1
    """Captions per image and step, for tasks that read captions; the image is encoded once for all of them. They are
    drawn at random, none twice before all were drawn."""
    origins: tuple[tuple[str, float], ...] = ()
    """(origin, weight) pairs. Where a caption comes from is drawn by these weights among the origins of the image's
    texts, such as `web`, `synthetic` and `human` in what `jaxmm capfilt merge` writes; texts of other origins are not
    used. Texts without an origin are drawn alike. (): all texts are."""
    questions: Annotated[int, POSITIVE] = 1
    """Questions per image, if the source has questions; the image is encoded once. From 2 on the others are drawn from
    the questions about the same image."""
    workers: Annotated[int, at_least(0)] = 0
    """Processes that decode images (0: threads of this process). The order of the data does not depend on it."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. Default: `TFDS_DATA_DIR`, else TFDS's default."""
    max_bad: Annotated[float, Limit("a share from 0 to 1", lambda value: 0 <= value <= 1)] = 0.05
    """Share of unreadable records above which a run stops."""
    image: ImageConfig = field(default_factory=ImageConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)

    def __post_init__(self):
        """Check the weights of origins."""
        check_types(self, "data")
        names, weights = zip(*self.origins, strict=True) if self.origins else ((), (1.0,))
        require(len(set(names)) == len(names) and min(weights) >= 0 < max(weights) < math.inf, "data.origins",
                self.origins, "different origins with weights of 0 or more, one above 0")


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
    learning_rate: Annotated[float, at_least(0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "exponential", "rsqrt", "linear", "constant"] = "cosine"
    warmup: Annotated[float, at_least(0)] = 0.05
    """Linear warm-up from 0: a count of steps, or below 1 a share of all steps."""
    cooldown: Annotated[float, at_least(0)] = 0.0
    """Linear decay to 0 at the end (for rsqrt and constant): a count of steps, or below 1 a share of all steps."""
    final: float = 0.0
    """Final learning rate of cosine, linear and exponential as a share of the peak; exponential: above 0."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decoupled, multiplied by the learning rate (AdamW of torch and optax)."""
    decay: str = r"/(kernel|embedding)$"
    """Regular expression of the parameter paths with weight decay; the rest (biases, norms, scales, class tokens,
    position tables) has none."""
    b1: Annotated[float, BELOW_ONE] = 0.9
    b2: Annotated[float, BELOW_ONE] = 0.999
    eps: float = 1e-8
    momentum: Annotated[float, BELOW_ONE] = 0.9
    """Momentum of SGD and Muon."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment."""
    clip: Annotated[float | None, POSITIVE] = 1.0
    """Maximum global norm of the gradient; None: no clipping."""
    layer_decay: Annotated[float | None, UP_TO_ONE] = None
    """Layer-wise learning-rate decay: the factor between a layer's learning rate and that of the next (BEiT, MAE)."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(regular expression, factor) pairs for the learning rate; the first that matches a path is used."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of frozen parameter paths: no update, no moments, no decay."""
    average: Annotated[float | None, UP_TO_ONE] = None
    """Decay of an exponential moving average of the parameters, for evaluators; None: no average."""

    def __post_init__(self):
        """Check the schedule's final rate and regular expressions."""
        check_types(self, "optimizer")
        require(self.final > 0 or self.schedule != "exponential", "optimizer.final", self.final,
                "above 0 for the exponential schedule")
        check_patterns("optimizer.decay", (self.decay,))
        check_patterns("optimizer.freeze", self.freeze)
        check_patterns("optimizer.multipliers", [pattern for pattern, _ in self.multipliers])


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Device mesh. The product of the axes is the number of devices used."""

    data: Annotated[int, Limit("a positive number, or -1 for the rest", lambda value: value > 0 or value == -1)] = -1
    """Data parallelism: copies of the model; -1: all devices that the other axes leave."""
    fsdp: Annotated[int, POSITIVE] = 1
    """FSDP: shards of parameters and optimizer state; the batch is sharded over them too."""
    tensor: Annotated[int, POSITIVE] = 1
    """Tensor parallelism: shards of the heads and MLP hidden units of a layer."""

    def __post_init__(self):
        check_types(self, "mesh")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which ones are kept."""

    every: Annotated[int, POSITIVE] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, POSITIVE] = 2
    """Number of newest checkpoints to keep."""
    best: str | None = None
    """A metric such as `val/top1`: the checkpoint where it is highest (a loss: lowest) is kept too."""

    def __post_init__(self):
        check_types(self, "checkpoint")


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
    encodes_single_images: ClassVar[bool] = False
    """True if the images of a record are encoded one by one, by a task that reads one image per record."""

    def __post_init__(self):
        """Check the batch size, whose field subclasses define again."""
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
    steps: Annotated[int, POSITIVE] = 1000
    """Optimizer steps of the run."""
    seed: Annotated[int, Limit("0 to 2^32 - 1", lambda value: 0 <= value < 2**32)] = 0
    """Seed of everything random: parameters, order of the data, augmentation, dropout."""
    microbatches: Annotated[int, POSITIVE] = 1
    """Number of sequential parts of each batch: less memory, the same gradient."""
    data: DataConfig = field(default_factory=DataConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: tuple[Evaluator, ...] = ()
    """Evaluators that run every `eval_every` steps and at the end."""
    log_every: Annotated[int, POSITIVE] = 20
    """Steps between lines of `metrics.jsonl`."""
    eval_every: Annotated[int | None, POSITIVE] = None
    """Steps between evaluations; None: only at the end."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a loss or gradient that is not finite: stop the run, or skip the step and keep the state."""
    max_skips: Annotated[int, POSITIVE] = 10
    """Number of consecutive skipped steps after which the run stops."""

    def __post_init__(self):
        """Check that the microbatches divide the batch."""
        check_types(self)
        require(self.data.batch_size % self.microbatches == 0, "microbatches", self.microbatches,
                f"a divisor of data.batch_size = {self.data.batch_size}")
