"""Runs small enough to compile in seconds: three real models, and a linear one for what needs no model."""

import contextlib
import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmm.checkpoints import Checkpoints
from jaxmm.config import (
    CheckpointConfig,
    DataConfig,
    Evaluator,
    ImageConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxmm.data.pipeline import step_records, train_batches
from jaxmm.data.rows import image_id
from jaxmm.data.sources.registry import open_source
from jaxmm.models.attention_conv import AttentionConvConfig
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.igpt import IGPTConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.palette import Palette
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.sharding import named_leaves, place_batch
from jaxmm.task import Task
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.generative_classification import GenerativeClassification
from jaxmm.tasks.image_classification import Classification
from jaxmm.training import loop
from jaxmm.training.optimizer import Optimizer, make_optimizer
from jaxmm.training.setup import prepare

ATTENTIONS = ("quadratic", "generalised_quadratic", "learned", "learned_content")
SIDE, CLASSES, VOCABULARY, LENGTH = 12, 10, 64, 7


class Killed(BaseException):
    """An end that no handler of errors sees."""


def vision(**stack) -> ViTConfig:
    """9 patches of width 40 for 4 heads of 10: the mesh axes of the tests divide them."""
    stack = TransformerConfig(**{"width": 40, "depth": 2, "heads": 4, "mlp_dim": 56} | stack)
    return ViTConfig(transformer=stack, image_size=SIDE, patch=4)


def model_task(kind: str, **stack) -> Task:
    """A ViT classifier, iGPT with labels, CLIP or SigLIP in their published form; `stack` goes to every
    `TransformerConfig`."""
    if kind == "vit":
        return Classification(model=replace(vision(**stack), classes=CLASSES, pre_logits=48), mixup=0.4,
                              label_smoothing=0.1)
    if kind in ATTENTIONS:
        return Classification(model=AttentionConvConfig(
            **{"scores": kind, "width": 40, "depth": 2, "heads": 4, "mlp_dim": 56, "image_size": SIDE, "patch": 4,
               "classes": CLASSES, "dropout": 0.0, "attention_dropout": 0.0} | stack))
    if kind == "igpt":
        stack = TransformerConfig(**{"width": 40, "depth": 2, "heads": 4, "mlp_dim": 56, "init": "igpt"} | stack)
        palette = Palette(colors=tuple((level, -level, 0.5) for level in np.linspace(-1, 1, 16).tolist()))
        return GenerativeClassification(model=IGPTConfig(transformer=stack, image_size=SIDE, colors=16,
                                                         classes=CLASSES), palette=palette)
    text = TransformerConfig(**{"width": 24, "depth": 3, "heads": 4, "mlp_dim": 72} | stack)
    if kind == "clip":
        text = TextConfig(transformer=text, vocab_size=VOCABULARY, context_length=LENGTH)
        return ContrastiveLearning(model=CLIPConfig(vision=replace(vision(**stack), pre_norm=True, patch_bias=False),
                                            text=text, embed_dim=32))
    text = TextConfig(transformer=text, vocab_size=VOCABULARY, context_length=LENGTH, causal=False, pool="last")
    picture = replace(vision(**stack), pool="map", class_token=False)
    return ContrastiveLearning(kind="sigmoid", model=CLIPConfig(
        vision=picture, text=text, embed_dim=40, vision_projection=False, text_projection_bias=True,
        logit_scale=math.log(10), logit_bias=-10.0))


def batch(kind: str, step: int, size: int) -> dict[str, np.ndarray]:
    """Random pictures with labels, or with texts, some of which are of the same picture or of the same words."""
    rng = np.random.default_rng([size, step])
    result = {"image": rng.integers(0, 256, (size, SIDE, SIDE, 3)).astype(np.uint8)}
    if kind in ("vit", "igpt") or kind in ATTENTIONS:
        return result | {"label": rng.integers(0, CLASSES, size).astype(np.int32)}
    tokens = rng.integers(1, VOCABULARY, (size, LENGTH)).astype(np.int32)
    ids = [rng.integers(0, size, (size, 1)).astype(np.int32) * [1, 3] for _ in range(2)]
    return result | {"tokens": tokens, "image_id": ids[0].astype(np.int32), "text_id": ids[1].astype(np.int32)}


@dataclass(frozen=True, kw_only=True)
class Linear(Task):
    """Regression of digits' labels on their pixels, whose loss is NaN where a picture of `poison` is in the batch."""

    poison: tuple[tuple[int, int], ...] = ()
    width: int = 3
    """Of a factor between pixels and classes, so that runs can differ in their arrays."""
    reads: ClassVar = ("image", "label")
    decomposes: ClassVar[bool] = True

    def bind(self, *, image_size, classes, tokenizer):
        return self

    def init(self, rng):
        first, second = jax.random.split(rng)
        return {"up": {"kernel": 0.1 * jax.random.normal(first, (8 * 8 * 3, self.width))},
                "head": {"kernel": 0.1 * jax.random.normal(second, (self.width, CLASSES)),
                         "bias": jnp.zeros(CLASSES)}}

    def init_extra(self, params, rng):
        return {"seen": jnp.zeros((), jnp.int32)}

    def encode(self, params, batch, rng):
        x = batch["image"].reshape(len(batch["image"]), -1) / 255.0
        return x @ params["up"]["kernel"] @ params["head"]["kernel"] + params["head"]["bias"][None]

    def objective(self, params, outputs, batch):
        loss = jnp.square(outputs - jax.nn.one_hot(batch["label"], CLASSES)).mean()
        for bad in self.poison:
            loss = loss * jnp.where((batch["image_id"] == jnp.asarray([bad])).all(axis=1).any(), jnp.nan, 1.0)
        return loss, {}

    def loss(self, params, extra, batch, rng):
        loss, (_, metrics) = super().loss(params, extra, batch, rng)
        return loss, ({"seen": extra["seen"] + len(batch["label"])}, metrics)


class Steep(Linear):
    """The same, with a loss that stays finite there, while its gradient is not."""

    def objective(self, params, outputs, batch):
        loss, metrics = Linear.objective(replace(self, poison=()), params, outputs, batch)
        bad = (batch["image_id"][:, None] == jnp.asarray(self.poison)[None]).all(axis=2).any()
        mean = outputs.mean()
        return loss + jnp.sqrt(jnp.where(bad, 0.0, 1.0) + mean - jax.lax.stop_gradient(mean)), metrics


class Plain(Linear):
    """The same without extra state, so that its loss can be computed in parts."""

    loss = Task.loss


@dataclass(frozen=True, kw_only=True)
class HeadBias(Evaluator):
    """Measures the bias of `Linear`, which every step changes."""

    def check(self, context):
        pass

    def metrics(self, context):
        return ("val/bias",)

    def run(self, context):
        yield "val/bias", float(np.abs(np.asarray(context.params["head"]["bias"])).sum())


LINEAR = TrainConfig(
    task=Linear(), steps=12, seed=3, log_every=1,
    data=DataConfig(train="digits:train", val=None, batch_size=16,
                    image=ImageConfig(size=8, train_crop="center", flip=False)),
    optimizer=OptimizerConfig(schedule="constant", warmup=0.0, average=0.7), mesh=MeshConfig(data=1),
    checkpoint=CheckpointConfig(every=4, keep=3))
"""A run of seconds; its schedule does not depend on the number of steps."""


def clip_run(data_dir: str | Path, **fields: Any) -> TrainConfig:
    """CLIP on 160 generated scenes, its tokenizer trained by the run."""
    stack = {"depth": 2, "heads": 2, "dropout": 0.1}
    model = CLIPConfig(
        vision=ViTConfig(transformer=TransformerConfig(width=24, mlp_dim=40, **stack), image_size=16, patch=4),
        text=TextConfig(transformer=TransformerConfig(width=16, mlp_dim=56, **stack), vocab_size=None,
                        context_length=12, pool="eos"), embed_dim=20)
    data = DataConfig(train="scenes:tiny/train", val=None, batch_size=12, data_dir=str(data_dir),
                      image=ImageConfig(size=16, scale=(0.5, 1.0)),
                      tokenizer=TokenizerConfig(vocab_size=150, context_length=12))
    return replace(LINEAR, task=ContrastiveLearning(model=model), data=data, **fields)


def poison(config: TrainConfig, *steps: int) -> TrainConfig:
    """`config` with a loss that is NaN in `steps`."""
    source = open_source(config.data.train)
    records = [step_records(len(source), config.data.batch_size, config.seed, step - 1)[0] for step in steps]
    ids = tuple(tuple(image_id(source[int(record)]).tolist()) for record in records)
    return replace(config, task=replace(config.task, poison=ids))


@functools.cache
def plain_optimizer(task: Task, average: float | None = None) -> Optimizer:
    """AdamW with everything that is usual."""
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup=0.0, schedule="cosine", average=average)
    return make_optimizer(config, jax.eval_shape(task.init, jax.random.key(0)), 20, task.clamps)


def lines(workdir: Path, name: str | None = None) -> list:
    """The lines of `metrics.jsonl`, or the (step, value) pairs of one metric."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return rows if name is None else [(row["step"], row[name]) for row in rows if name in row]


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Equal lines of metrics but for the speed, and last states that are equal bit for bit."""
    one, other = ([{name: value for name, value in row.items() if name != "train/pictures_per_second"}
                   for row in lines(folder)] for folder in (workdir, undisturbed))
    assert one == other
    assert_same_bits(restored(workdir, one[-1]["step"]), restored(undisturbed, one[-1]["step"]))


def assert_every_array_matters(config: TrainConfig, workdir: Path) -> int:
    """Alter every array of the newest checkpoint in turn: what the next step returns is not the same.

    All are others than those of a new run, so that one that is not restored is noticed, too. Return their number,
    without the number of skipped steps, which a good step forgets.
    """
    setup = prepare(config, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh(setup.mesh), contextlib.closing(checkpoints):
        saved, _ = checkpoints.restore(setup.like)
        first = dict(named_leaves(loop.sharded_state(setup.task, setup.optimizer, config.seed, setup.like)))
        step = loop.compile_step(setup.task, setup.optimizer, setup.mesh, setup.like, microbatches=config.microbatches,
                                 skip_nonfinite=config.nonfinite == "skip")
        batch = next(train_batches(setup.train, config.data, setup.tokenizer, seed=config.seed,
                                   labels="label" in setup.task.reads))
        batch = place_batch({name: batch[name] for name in loop.INPUTS if name in batch}, setup.mesh)

        def after(state):
            return leaves(step(jax.tree.map(jnp.copy, state), batch, jax.random.key(0)))

        expected, (old, structure) = after(saved), jax.tree.flatten(saved)
        for i, (name, leaf) in enumerate(named_leaves(saved)):
            if name == "skips":
                continue
            assert not np.array_equal(leaf, first[name]), name
            altered = after(structure.unflatten([*old[:i], leaf + 1, *old[i + 1:]]))
            assert any(a.tobytes() != b.tobytes() for a, b in zip(altered, expected, strict=True)), name
    return len(old) - 1


def restored(workdir: Path, step: int) -> Any:
    """The state of a checkpoint, as a dict of arrays."""
    with ocp.StandardCheckpointer() as reader:
        return reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())


def leaves(tree: Any) -> list[np.ndarray]:
    """The arrays of `tree`, copied to the host."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(one: Any, other: Any) -> None:
    """Equal structures of arrays that are equal bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
