"""The interface of an objective: its loss, and records of what a model trained with it can do."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxmm.validation import ConfigError, require

Params = Any
"""A pytree of fp32 arrays."""
Batch = dict[str, jax.Array]
"""A global batch: arrays with a leading example axis."""
Outputs = Any
"""A pytree of arrays with a leading example axis: what the loss needs from each example."""
Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """Vectors of images, and of texts in the same space. logits = scale * cosine + bias."""

    image: Callable[[Params, Batch], Float[Array, "b e"]]
    """Embeddings of `batch["image"]`, of length 1 if texts are embedded too; a classifier's features otherwise."""
    text: Callable[[Params, Batch], Float[Array, "b e"]] | None = None
    """Embeddings of `batch["tokens"]`, of length 1; None: texts are not embedded."""
    features: Callable[[Params, Batch], Float[Array, "b d"]]
    """Features of `batch["image"]` in the backbone, for linear probes and nearest neighbours."""
    layers: Callable[[Params, Batch], Float[Array, "b l d"]] | None = None
    """Features of `batch["image"]` in every layer, the first one first; None: only `features` are offered."""
    scale: Callable[[Params], Float[Array, ""]] = lambda params: jnp.ones(())
    bias: Callable[[Params], Float[Array, ""]] = lambda params: jnp.zeros(())
    text_length: Callable[[Int[Any, "b t"]], Int[Any, "b"]] | None = None
    """Number of leading tokens that each text's embedding depends on, so that texts may be cut behind them; None: all
    of them."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Logits of the classes that a head tells apart."""

    logits: Callable[[Params, Batch], Float[Array, "b c"]]
    reads_text: bool = False
    """True if the batch needs `tokens` beside `image`, as in NLVR2 (`image` is [b 2 h w 3] then)."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model that writes token by token: a text, or an image.

    Rows of tokens may be a multiple of the rows of context, for several texts or beams per image: row r of the tokens
    reads context r // (rows // contexts).
    """

    context: Callable[[Params, Batch], tuple[Array, Bool[Array, "b n"] | None]] | None
    """The input of cross-attention, from `batch["image"]` (and `batch["tokens"]`, if `reads_text`), and the mask of its
    valid positions (None: all are valid). None: the decoder has no context."""
    prepare: Callable[[Params, Any], Any] = lambda params, context: context
    """Values that all steps share, computed once: the cross-attention cache of each layer. `context` may be None."""
    cache: Callable[[int, int], Any]
    """(rows, length) to an empty self-attention cache: a pytree of arrays with the leading axis `rows`."""
    decode_step: Callable[..., tuple[Float[Array, "r v"], Any]]
    """(params, tokens [r], position, cache, prepared, cache mask [r length], context mask) to the logits of the next
    token, and the cache with this one."""
    logits: Callable[..., Float[Array, "r t v"]]
    """(params, tokens [r t], prepared, context mask) to the logits after each token, all at once."""
    attention: Callable[[Params, Batch, Int[Array, "b t"]], Float[Array, "b t g g"]] | None = None
    """(params, batch, tokens) to the cross-attention of each token over the image's g x g patches, the mean over
    layers and heads; zeros for the first token, which is given."""
    start_id: int
    """Token at position 0."""
    end_id: int | None
    """Token that ends a text; None: every sequence has the full length."""
    pad_id: int | None
    """Token behind the end; None: there is none."""
    longest: int
    """Most tokens that a sequence can have, the first one included."""
    vocab_size: int
    prompt: str = ""
    """Text that training put before each text."""
    reads_text: bool = False
    """True if the context depends on `batch["tokens"]`: a question."""
    to_tokens: Callable[[UInt8[Array, "b s s 3"]], Int[Array, "b t"]] | None = None
    """Tokens of images behind the first token; None: the decoder writes no images."""
    to_images: Callable[[Int[Array, "b t"]], UInt8[Array, "b s s 3"]] | None = None
    """Images of tokens, as `to_tokens` returns them; None: the decoder writes no images."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the image that the tokens are read from, row by row; None: the decoder writes no images."""


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """A head that tells whether an image and a text belong together. Each image is encoded once for all its texts."""

    encode: Callable[[Params, Batch], Float[Array, "b n c"]]
    """Image tokens of `batch["image"]`."""
    embed: Callable[[Params, Float[Array, "b n c"]], Float[Array, "b e"]] | None
    """Image embeddings, as `Embedder.image` returns, from image tokens; None: images are not embedded."""
    logits: Callable[[Params, Float[Array, "b n c"], Int[Array, "b g t"]], Float[Array, "b g 2"]]
    """Logits of "do not belong together" and "belong together" of g texts per image."""
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class PatchAttention:
    """Self-attention between the patches of an image."""

    weights: Callable[[Params, Batch], Float[Array, "b l h n n"]]
    """Attention weights of every layer and head, from each patch of `batch["image"]` to all patches, row by row. Over
    the patches they add up to 1: other tokens are left out."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


class PositionGrid(NamedTuple):
    """The layout of a table of patch positions."""

    shape: tuple[int, int]
    """Rows and columns of patches."""
    extra: int
    """Positions before those of the patches, such as the class token's."""


def flat_ids(batch: Batch) -> Int[Array, "m 2"] | None:
    """Return the ids of all texts of a batch, one image after the other; None if it has none."""
    ids = batch.get("text_id")
    return None if ids is None else ids.reshape(-1, 2)


def check_image_size(image_size: int, model: Any, name: str = "task.model") -> None:
    """Raise `ConfigError` if images of the data are not of the size that the configuration `model` reads."""
    require(image_size == model.image_size, "data.image.size", image_size,
            f"the model's {name}.image_size = {model.image_size}")


def with_classes(model: Any, classes: int | None) -> Any:
    """Return the configuration `model` with the data's number of classes. Raise `ConfigError` if they do not fit."""
    if classes is None:
        raise ConfigError("data.train has no labels; expected a source with classes, such as folder:DIR")
    require(model.classes in (None, classes), "task.model.classes", model.classes, f"None, or the source's {classes}")
    return dataclasses.replace(model, classes=classes)


def check_pairs(image_size: int, vision: Any, tokenizer: Any | None) -> None:
    """Raise `ConfigError` if images and texts of the data do not fit a task that reads both.

    `vision` is the configuration of the model's image tower.
    """
    check_image_size(image_size, vision, "task.model.vision")
    if tokenizer is None:
        raise ConfigError("data.train has no texts; expected a source with captions, such as captions:FILE.jsonl")


class Task:
    """Base of the objectives: subclasses are frozen dataclasses whose methods are pure functions.

    Most objectives are `objective(params, encode(params, prepare(batch)))`: `encode` treats every example by itself and
    `objective` reads the global batch. The train step can then accumulate microbatches exactly. Other objectives
    override `loss`. What a trained model can do is in the capability records, which a subclass overrides by properties.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)
    """Parts of a record that the task needs: `image`, `text`, `label`, `answers`."""
    images_per_record: ClassVar[int] = 1
    several_captions: ClassVar[bool] = False
    """True if the loss takes `tokens` [b n t] and `text_id` [b n 2] too, n captions of each image (`data.captions`)."""
    decomposes: ClassVar[bool] = False
    """True if the loss of a batch is the mean of the losses of its parts."""
    clamps: ClassVar[tuple[tuple[str, float, float], ...]] = ()
    """(path pattern, lowest, highest): limits that the optimizer clamps parameters to."""

    module: ClassVar[Any] = None
    """The Flax module whose parameters `init` returns; None: there is no single one."""
    image_size: ClassVar[int | None] = None
    """Side in pixels of the images that the model reads; None: that of the data's configuration."""
    classes: ClassVar[int | None] = None
    """Number of classes; None: that of the data, or no head."""
    text_config: ClassVar[Any] = None
    """Configuration of the part that reads texts, or writes them; None: there is none."""
    context_length: ClassVar[int | None] = None
    """Tokens that every text is padded to; None: any number that the model has positions for."""
    text_positions: ClassVar[str | None] = None
    """Path of the position table of texts, if it has one row for each of `context_length` tokens; it can be resized."""
    embedder: ClassVar[Embedder | None] = None
    classifier: ClassVar[Classifier | None] = None
    decoder: ClassVar[Decoder | None] = None
    matcher: ClassVar[Matcher | None] = None
    patch_attention: ClassVar[PatchAttention | None] = None

    @property
    def splits(self) -> bool:
        """True if the loss can be computed in microbatches."""
        return type(self).loss is Task.loss

    @property
    def writes_captions(self) -> bool:
        """True if there is a decoder that writes a text and needs an image and nothing else."""
        decoder = self.decoder
        return not (decoder is None or decoder.context is None or decoder.reads_text or decoder.to_images)

    @property
    def generates_images(self) -> bool:
        """True if there is a decoder that writes images and needs nothing."""
        return self.decoder is not None and self.decoder.context is None and self.decoder.to_images is not None

    @property
    def answers_questions(self) -> bool:
        """True if there is a decoder that reads a text and then writes."""
        return self.decoder is not None and self.decoder.reads_text

    def with_blockwise_loss(self, size: int) -> "Task | None":
        """Return this task with its loss in blocks of `size` x `size` logits; None if it has none, or does so already.
        """
        return None

    def adopt(self, trained: "Task", image_size: int) -> "Task | None":
        """Return this task with the architecture of `trained` at `image_size`, to start from its parameters.

        Heads are left out, and what only training uses (dropout, remat, dtype) stays. None: they have nothing in
        common.
        """
        return self if type(trained) is type(self) else None

    def trained_path(self, path: str, trained: "Task") -> str | None:
        """Return the path in `trained` of the parameter at `path`; None if it starts anew."""
        return path

    def position_grid(self, path: str) -> PositionGrid | None:
        """Return the grid of the position table at `path`, to resize it; None for other parameters."""
        return None

    def with_dtype(self, dtype: str) -> "Task":
        """Return this task computing in `dtype`: every field of that name in its configuration is replaced."""
        return with_fields(self, dtype=dtype)

    def with_context_length(self, length: int) -> "Task":
        """Return this task for texts of `length` tokens, whose position table is resized; texts are otherwise cut."""
        return self if self.text_positions is None else with_fields(self, context_length=length)

    def bind(self, *, image_size: int, classes: int | None, tokenizer: Any | None) -> "Task":
        """Return this task with what only the data knows filled in. Raise `ConfigError` if they do not fit."""
        raise NotImplementedError

    def fit(self, images: Callable[[int], UInt8[Any, "n s s 3"]]) -> "Task":
        """Return this task with what it computes from the training images before the first step, such as a palette.

        `images(count)` returns up to `count` of them, evenly spaced, resized as for evaluation.
        """
        return self

    def with_steps(self, steps: int) -> "Task":
        """Return this task with its shares of a run of `steps` as numbers of steps."""
        return self

    def check_batch(self, size: int) -> None:
        """Raise `ConfigError` if the loss takes no batch of this size."""

    def init(self, rng: Key[Array, ""]) -> Params:
        """Return new parameters."""
        raise NotImplementedError

    def init_extra(self, params: Params, rng: Key[Array, ""]) -> Any:
        """Return state besides the parameters that is derived from them: momentum copies, queues."""
        return {}

    def prepare(self, batch: Batch, rng: Key[Array, ""]) -> Batch:
        """Return the batch with its examples mixed, before they are encoded (mixup)."""
        return batch

    def encode(self, params: Params, batch: Batch, rng: Key[Array, ""]) -> Outputs:
        """Return what the loss needs from each example, computed from that example alone, as in training."""
        raise NotImplementedError

    def objective(self, params: Params, outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss over the global batch of outputs, and the metrics to log."""
        raise NotImplementedError

    def loss(
        self, params: Params, extra: Any, batch: Batch, rng: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
        """Return the loss over the global batch, the new extra state, and the metrics to log."""
        mixing, drawing = jax.random.split(rng)
        batch = self.prepare(batch, mixing)
        loss, metrics = self.objective(params, self.encode(params, batch, drawing), batch)
        return loss, (extra, metrics)


def capabilities(task: Task) -> tuple[str, ...]:
    """Return what a model trained with `task` can do, in words for messages."""
    embedder, classifier = task.embedder, task.classifier
    offered = {"embeds images": embedder, "embeds images in every layer": embedder and embedder.layers,
               "embeds texts": embedder and embedder.text,
               "classifies images": classifier and not classifier.reads_text,
               "judges a text about several images": classifier and classifier.reads_text,
               "writes captions": task.writes_captions, "answers questions": task.answers_questions,
               "generates images": task.generates_images,
               "matches images and texts": task.matcher,
               "attends over patches": task.patch_attention}
    return tuple(name for name, record in offered.items() if record)


def with_fields(config: Any, **values: Any) -> Any:
    """Return the dataclass `config` with `values` for fields of these names, in nested dataclasses too."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    nested = {name: with_fields(value, **values) for name, value in fields.items()
              if dataclasses.is_dataclass(value) and not isinstance(value, type)}
    return dataclasses.replace(config, **nested, **{name: value for name, value in values.items() if name in fields})
