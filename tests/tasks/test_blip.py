"""BLIP's pre-training against plain numpy, over several steps: teacher, queues, ramp and negatives in their order."""

import re
from dataclasses import dataclass, fields, replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.config import MeshConfig, OptimizerConfig
from jaxmm.losses.image_text_matching import hard_negatives
from jaxmm.models.blip import BLIP
from jaxmm.sharding import batch_sharding, make_mesh, place_batch, shardings, with_shardings
from jaxmm.tasks import blip_pretraining as tasks
from jaxmm.tasks.blip_pretraining import EMPTY_ID, MOMENTUM_PARTS, BLIPPretraining
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import State
from jaxmm.training.step import train_step
from jaxmm.validation import ConfigError
from tests import reference
from tests.models.test_blip import MODEL, parameters
from tests.reference import fp64, log_softmax
from tests.training.common import assert_same_bits

B, T, QUEUE = 4, 6, 10
TASK = BLIPPretraining(model=MODEL, queue=QUEUE, momentum=0.9, alpha=0.4, ramp=3, smoothing=0.1)


@cache
def loss_among(negatives):
    """The loss, compiled."""
    return jax.jit(replace(TASK, negatives=negatives).loss)


@cache
def gradients(task):
    """Value of the loss of `task`, and its gradients for the parameters, compiled."""
    return jax.jit(jax.value_and_grad(task.loss, has_aux=True))


def batch(step, captions=1):
    """Two captions of a picture are in each batch, and one picture of the batch before.

    With several captions, the first picture's last one is also the last picture's first one.
    """
    rng = np.random.default_rng(step)
    several = (captions,) if captions > 1 else ()
    tokens = rng.integers(1, 15, (B, *several, T))
    tokens[1, ..., 4:] = 0
    image_id, text_id = rng.integers(0, 1000, (B, 2)), rng.integers(0, 1000, (B, *several, 2))
    if captions > 1:
        text_id[0, -1] = text_id[3, 0] = [8, 9]
        tokens[2, 0, 2:] = 0
    image_id[2] = image_id[0]
    image_id[3] = [7, 7 + step // 2]
    return {"image": jnp.asarray(rng.integers(0, 256, (B, 6, 6, 3)), jnp.uint8),
            "tokens": jnp.asarray(tokens, jnp.int32), "image_id": jnp.asarray(image_id, jnp.int32),
            "text_id": jnp.asarray(text_id, jnp.int32)}


def start():
    params = parameters(MODEL) | {"temperature": jnp.float32(0.2)}
    return params, TASK.init_extra(params, jax.random.key(1))


@pytest.fixture(scope="module")
def trained():
    """Value of the loss, and its gradients for the parameters and for what it keeps, compiled."""
    return jax.jit(jax.value_and_grad(TASK.loss, argnums=(0, 1), has_aux=True, allow_int=True))


class Oracle:
    """The pre-training of ALBEF and BLIP as their papers describe it, one pair after the other.

    With several captions of a picture: all are its positives, and each is matched and written as if it were the only
    one.
    """

    def __init__(self, params, extra, among=B, dtype=np.float32):
        self.p, self.among, self.dtype = fp64(params), among, dtype
        self.teacher = {name: self.p[name] for name in MOMENTUM_PARTS}
        self.queue = [(np.asarray(image, np.float64), np.asarray(text, np.float64), None, None)
                      for image, text in zip(extra["image_queue"], extra["text_queue"], strict=True)]
        self.steps = 0

    def embed(self, p, pixels, tokens):
        seen = reference.vit(p["vision"], pixels, MODEL.vision)[0]
        text = reference.med(p["text"], tokens, MODEL.text)
        image, text = (x[:, 0] @ p[name]["kernel"] + p[name]["bias"] for x, name in (
            (seen, "vision_projection"), (text, "text_projection")))
        return seen, reference.unit(image), reference.unit(text)

    def losses(self, data, rng):
        p, tokens = self.p, np.asarray(data["tokens"]).reshape(B, -1, T)
        n, keys = tokens.shape[1], jax.random.split(rng, 3)[1][None]
        keys = keys if n == 1 else jax.random.split(keys[0], n)
        std, mean = np.array(TASK.pixels.std), np.array(TASK.pixels.mean)
        pixels = (np.asarray(data["image"], np.float64) / 255 - mean) / std
        picture = [tuple(row) for row in np.asarray(data["image_id"]).tolist()]
        words = [[tuple(row) for row in rows] for rows in np.asarray(data["text_id"]).reshape(B, n, 2).tolist()]
        seen, image, text = self.embed(p, pixels, tokens.reshape(-1, T))
        self.teacher = jax.tree.map(lambda old, new: TASK.momentum * old + (1 - TASK.momentum) * new, self.teacher,
                                    {name: p[name] for name in MOMENTUM_PARTS})
        _, image_m, text_m = self.embed(p | self.teacher, pixels, tokens.reshape(-1, T))
        text, text_m = (x.reshape(B, n, -1) for x in (text, text_m))
        alpha = TASK.alpha * min(1.0, self.steps / TASK.ramp)

        def towards(mine, taught, columns, belongs):
            logits, told = (x @ np.stack(columns).T / p["temperature"] for x in (mine, taught))
            target = alpha * np.exp(log_softmax(told, 0)) + (1 - alpha) * np.array(belongs) / sum(belongs)
            return -(target * log_softmax(logits, 0)).sum()

        contrastive = 0.0
        for i in range(B):
            others = [(j, text_m[j, k], picture[j], words[j][k]) for j in range(B) for k in range(n)]
            others += [(None, each[1], each[2], each[3]) for each in self.queue]
            contrastive += towards(image[i], image_m[i], [each[1] for each in others], [
                i == j or picture[i] == its or said in words[i] for j, _, its, said in others]) / B / 2
            others = [(j, image_m[j], picture[j], words[j]) for j in range(B)]
            others += [(None, each[0], each[2], [each[3]]) for each in self.queue]
            for k in range(n):
                contrastive += towards(text[i, k], text_m[i, k], [each[1] for each in others], [
                    i == j or picture[i] == its or words[i][k] in said for j, _, its, said in others]) / (B * n) / 2

        matching, writing = 0.0, []
        for k, key in enumerate(keys):
            positive = np.array([[i == j or picture[i] == picture[j] or words[i][k] == words[j][k] for j in range(B)]
                                 for i in range(B)])
            groups = [range(i, i + self.among) for i in range(0, B, self.among)]
            similar = [x @ y.T / p["temperature"] for x, y in ((text[:, k], image_m), (image, text_m[:, k]))]
            pictures, texts = ((np.asarray(hard_negatives(
                *(jnp.asarray([x[np.ix_(group, group)] for group in groups])
                  for x in (logits.astype(self.dtype), positive)), one)[0])
                + [[group[0]] for group in groups]).ravel() for logits, one in zip(
                    similar, jax.random.split(key), strict=True))
            for label, rows, said in ((1, seen, tokens[:, k]), (0, seen[pictures], tokens[:, k]),
                                      (0, seen, tokens[texts, k])):
                started = said.copy()
                started[:, 0] = MODEL.text.encode_id
                states = reference.med(p["text"], started, MODEL.text, rows, keep=said != 0)[:, 0]
                logits = states @ p["matching_head"]["kernel"] + p["matching_head"]["bias"]
                matching -= log_softmax(logits, 1)[:, label].sum() / (3 * B) / n

            started = tokens[:, k].copy()
            started[:, 0] = MODEL.text.decode_id
            states = reference.med(p["text"], started, MODEL.text, seen, causal=True)
            told = log_softmax(reference.language_head(p["text"], states, MODEL.text), 2)
            writing.append(np.mean([-(1 - TASK.smoothing) * told[b, t - 1, started[b, t]]
                                    - TASK.smoothing * told[b, t - 1].mean()
                                    for b in range(B) for t in range(1, T) if started[b, t] != 0]))

        for i in range(B):      # a ring: the oldest go
            place = (self.steps * B + i) % len(self.queue)
            self.queue[place] = image_m[i], text_m[i, 0], picture[i], words[i][0]
        self.steps += 1
        return contrastive, matching, np.mean(writing)


@pytest.mark.parametrize("negatives", [None, 2])
def test_the_three_losses_over_steps(negatives):
    params, extra = start()
    oracle = Oracle(params, extra, negatives or B)
    loss = loss_among(negatives)
    for step in range(5):
        rng = jax.random.key(step)
        want = oracle.losses(batch(step), rng)
        total, (extra, metrics) = loss(params, extra, batch(step), rng)
        got = [metrics[name] for name in ("contrastive", "matching", "writing")]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(total, sum(want), rtol=1e-5)
        params = jax.tree.map(lambda x: x * 1.01, params)      # as if it had learned
        oracle.p = fp64(params)
    assert int(extra["place"]) == 5 * B % QUEUE and int(extra["step"]) == 5
    np.testing.assert_allclose(extra["image_queue"], np.stack([each[0] for each in oracle.queue]), atol=1e-5)
    assert (extra["text_ids"] != EMPTY_ID).all()


def double(tree):
    """The tree with its fp32 arrays in fp64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x, tree)


def in_double(task):
    """`task` with activations in fp64."""
    vision, text = (replace(part, transformer=replace(part.transformer, dtype="float64"))
                    for part in (MODEL.vision, MODEL.text))
    return replace(task, model=replace(MODEL, vision=vision, text=text))


@pytest.mark.standard_promotion
def test_several_captions_of_an_image():
    """fp64: each loss is its definition to 1e-6, over two steps, on one device and eight, and in blocks."""
    captions, mesh = 2, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.enable_x64(True):
        task, (params, _) = in_double(replace(TASK, queue=12)), double(start())
        extra = double(task.init_extra(params, jax.random.key(1)))
        oracle = Oracle(params, extra, dtype=np.float64)
        one, eight, blocks = (jax.jit(one.loss) for one in (task, task, replace(task, tile=3)))
        for step in range(2):
            rng, data = jax.random.key(step), batch(step, captions)
            want, before = oracle.losses(data, rng), extra
            total, (extra, metrics) = one(params, extra, data, rng)
            np.testing.assert_allclose([metrics[name] for name in ("contrastive", "matching", "writing")], want,
                                       rtol=1e-6)
            np.testing.assert_allclose(total, sum(want), rtol=1e-6)
        assert int(extra["place"]) == 2 * B and int((extra["text_ids"] != EMPTY_ID).all(axis=1).sum()) == 2 * B
        with jax.set_mesh(mesh):
            spread = jax.device_put((params, before), shardings((params, before), mesh))
            placed = place_batch(jax.tree.map(np.asarray, data), mesh)
            for run in (eight, blocks):
                np.testing.assert_allclose(run(*spread, placed, rng)[0], total, rtol=1e-6)


def test_several_captions_are_matched_and_written_as_if_alone(monkeypatch):
    """The losses with one caption each have the loss as their mean; two of three captions are matched.

    The negatives are the nearest ones here.
    """
    def nearest(similarity, positive, rng):
        return jnp.where(positive, -jnp.inf, similarity).argmax(axis=-1), ~positive.all(axis=-1)

    monkeypatch.setattr(tasks, "hard_negatives", nearest)
    params, extra = start()
    run, data = jax.jit(TASK.loss), batch(0, 3)
    data["text_id"] = data["text_id"].at[1, 1].set(data["text_id"][3, 1])
    each = [run(params, extra, data | {name: data[name][:, i] for name in ("tokens", "text_id")}, jax.random.key(0))
            for i in range(3)]
    _, (_, metrics) = jax.jit(replace(TASK, matched=2).loss)(params, extra, data, jax.random.key(0))
    for name, count in (("matching", 2), ("match_accuracy", 2), ("writing", 3)):
        want = np.mean([one[name] for _, (_, one) in each[:count]])
        np.testing.assert_allclose(metrics[name], want, rtol=1e-6)


def test_contrast_in_blocks_gives_the_same_losses(trained):
    params, extra = start()
    blocks = jax.jit(jax.value_and_grad(replace(TASK, tile=3).loss, has_aux=True))
    for step in range(3):
        rng, data = jax.random.key(step), batch(step)
        (want, (later, metrics)), (gradients, _) = trained(params, extra, data, rng)
        with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2))):
            (got, (extra, found)), slopes = blocks(params, extra, data, rng)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        extra = jax.device_get(extra)      # left on the mesh, it would have everything compiled again for it
        chex.assert_trees_all_close((slopes, found, extra), (gradients, metrics, later), rtol=1e-4, atol=1e-5)
    assert found["alpha"] > 0 and (extra["text_ids"] != EMPTY_ID).any()


@pytest.mark.parametrize("negatives, gathers", [(None, True), (2, False)])
def test_pictures_stay_where_they_are_if_their_negatives_do(negatives, gathers):
    task, params, extra = writes_not(*start())
    task = replace(task, negatives=negatives)
    with jax.set_mesh(mesh := make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        placed = with_shardings((params, extra), mesh)
        data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch(0))
        made = jax.jit(jax.grad(task.loss, has_aux=True)).lower(*placed, data, jax.random.key(0)).compile()
    all_tokens = rf"f32\[(1,)?{B},5,10\]\S* (all-gather|all-reduce)"   # one token more than 2 x 2 patches
    assert bool(re.search(all_tokens, made.as_text())) == gathers


def test_pairs_without_ids_belong_to_themselves_alone():
    params, extra = start()
    names = "image_id", "text_id"
    bare = {name: value for name, value in batch(0).items() if name not in names}
    different = dict.fromkeys(names, jnp.arange(2 * B, dtype=jnp.int32).reshape(B, 2))
    one, other = (loss_among(2)(params, extra, data, jax.random.key(0))[0] for data in (bare, bare | different))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_queue_that_cannot_be_shared():
    params, extra = start()
    with (jax.set_mesh(make_mesh(MeshConfig(data=4, tensor=2))),
          pytest.raises(ConfigError, match=r"task\.queue is 10; expected a multiple of the 4 devices")):
        jax.eval_shape(replace(TASK, tile=3).loss, params, extra, batch(0), jax.random.key(0))


def test_gradients_reach_the_student_only(trained):
    _, (student, others) = trained(*start(), batch(0), jax.random.key(0))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(student))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others["teacher"]))


HELD = (BLIPPretraining, "_momentum_features"), (tasks, "distilled_targets")
"""What no gradient goes through, and finite differences must not move."""


def watched(patch, held):
    """What the functions return that are held or draw, as they are called; of those in `held`, what that says."""
    found = {}
    for owner, name in (*HELD, (tasks, "hard_negatives")):
        real = getattr(owner, name)

        def run(*args, name=name, real=real):
            calls = found.setdefault(name, [])
            calls.append(held[name][len(calls)] if name in held else real(*args))
            return calls[-1]

        patch.setattr(owner, name, run)
    return found


@pytest.mark.standard_promotion
def test_gradients_are_finite_differences():
    """fp64: along a random direction of every parameter, each loss's central difference is its slope to 1e-6."""
    with jax.enable_x64(True):
        task, (params, extra) = in_double(TASK), double(start())
        extra |= {"step": jnp.asarray(2)}

        def losses(params, held):
            with pytest.MonkeyPatch.context() as patch:
                found = watched(patch, held)
                metrics = task.loss(params, extra, batch(1), jax.random.key(0))[1][1]
            return jnp.stack([metrics[name] for name in ("contrastive", "matching", "writing")]), found

        slopes, found = jax.jit(jax.jacrev(losses, has_aux=True))(params, {})
        held = {name: found[name] for _, name in HELD}
        moved, step, rng = jax.jit(losses), 1e-5, np.random.default_rng(0)
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, params))
        for i, slope in enumerate(jax.tree.leaves(slopes)):
            direction = rng.normal(size=leaves[i].shape)
            ends = []
            for side in (step, -step):
                there = structure.unflatten([*leaves[:i], leaves[i] + side * direction, *leaves[i + 1:]])
                end, drawn = moved(there, held)
                assert end.dtype == jnp.float64
                for one, other in zip(drawn["hard_negatives"], found["hard_negatives"], strict=True):
                    np.testing.assert_array_equal(one[0], other[0])
                ends.append(end)
            want = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose((slope * direction[None]).reshape(3, -1).sum(axis=1), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mesh", [
    MeshConfig(data=2, fsdp=2, tensor=2), pytest.param(MeshConfig(data=4), marks=pytest.mark.long)], ids=str)
def test_one_device_and_eight_compute_the_same(mesh):
    params, extra = start()
    want, (state, _) = loss_among(None)(params, extra, batch(0), jax.random.key(0))
    mesh = make_mesh(mesh)
    spread = jax.device_put((params, extra), shardings((params, extra), mesh))
    with jax.set_mesh(mesh):
        data = place_batch(jax.tree.map(np.asarray, batch(0)), mesh)
        got, (spread_state, _) = jax.jit(TASK.loss)(*spread, data, jax.random.key(0))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(spread_state), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def writes_not(params, extra, task=TASK):
    """The fine-tuning for retrieval: the task, its parameters and its state."""
    model = replace(MODEL, text=replace(MODEL.text, decoder=False))
    kept = {name: value for name, value in params["text"].items() if name != "head"}
    kept["blocks"] = {name: value for name, value in kept["blocks"].items() if not name.startswith("causal")}
    return replace(task, model=model), params | {"text": kept}, extra | {
        "teacher": extra["teacher"] | {"text": kept}}


def test_all_of_one_picture():
    """Nothing is a negative: only the pairs themselves are matched, and every gradient is finite."""
    task, params, extra = writes_not(*start())
    data = batch(0) | {"image_id": jnp.zeros((B, 2), jnp.int32)}
    (total, (_, metrics)), slopes = gradients(task)(params, extra, data, jax.random.key(0))
    module = BLIP(task.model)
    logits = module.apply({"params": params}, task.pixels(data["image"]), data["tokens"], train=False).match_logits
    np.testing.assert_allclose(metrics["matching"], -jax.nn.log_softmax(logits)[:, 1].mean(), rtol=1e-5)
    assert np.isfinite(float(total)) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@dataclass(frozen=True, kw_only=True)
class Poisoned(BLIPPretraining):
    """Its loss is NaN if the first image is number -1."""

    def loss(self, params, extra, batch, rng):
        value, rest = super().loss(params, extra, batch, rng)
        return jnp.where(batch["image_id"][0, 0] == -1, jnp.nan, value), rest


@pytest.mark.long
@pytest.mark.standard_promotion
def test_a_skipped_step_leaves_queues_and_teacher():
    task = Poisoned(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    task, params, extra = writes_not(*start(), task)
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), params, 10, task.clamps)
    state = State(step=jnp.int32(0), params=params, opt=optimizer.tx.init(params), extra=extra, average=None,
                  skips=jnp.int32(0))
    step = jax.jit(lambda state, batch: train_step(task, optimizer, state, batch, jax.random.key(0),
                                                   skip_nonfinite=True))
    good, _ = step(state, batch(0))
    skipped, metrics = step(good, batch(1) | {"image_id": batch(1)["image_id"].at[0, 0].set(-1)})
    assert not bool(metrics["finite"]) and int(skipped.skips) == 1
    assert_same_bits(skipped.replace(step=good.step, skips=good.skips), good)
    assert int(good.extra["place"]) == B and int(good.extra["step"]) == 1
    after, _ = step(skipped, batch(1))                              # all of it moves in a good one
    assert int(after.extra["place"]) == 2 * B and int(after.extra["step"]) == 2
    for name in ("image_queue", "text_queue", "image_ids", "text_ids"):
        assert not np.array_equal(after.extra[name], good.extra[name]), name
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.extra["teacher"], good.extra["teacher"])
    assert all(jax.tree.leaves(moved["vision"]))


def test_texts_without_words_and_texts_with_holes(trained):
    """An empty caption is its begin and end: only the end is written. What is padding in the middle counts nowhere."""
    params, extra = start()
    data = batch(0)
    end = MODEL.text.end_id
    empty = jnp.zeros((B, T), jnp.int32).at[:, 0].set(2).at[:, 1].set(end)
    holes = data["tokens"].at[:, 3].set(0)
    for tokens in (empty, holes):
        text = data | {"tokens": tokens}
        (_, (_, metrics)), (slopes, _) = trained(params, extra, text, jax.random.key(0))
        want = Oracle(params, extra).losses(text, jax.random.key(0))
        np.testing.assert_allclose([metrics[name] for name in ("contrastive", "matching", "writing")], want, rtol=1e-5,
                                   atol=1e-5)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_what_cannot_be():
    with pytest.raises(ConfigError, match=r"task\.queue is 3; expected at least data\.batch_size = 4"):
        params, extra = start()
        jax.eval_shape(lambda: replace(TASK, queue=3).loss(params, extra, batch(0), jax.random.key(0)))
    with pytest.raises(ConfigError, match=r"task\.negatives is 3; expected a divisor of data\.batch_size = 4"):
        replace(TASK, negatives=3).check_batch(4)
    with pytest.raises(ConfigError, match=r"task\.negatives is 1; expected two or more pairs"):
        replace(TASK, negatives=1)
    with pytest.raises(ConfigError, match=r"task\.alpha is 1"):
        replace(TASK, alpha=1.0)
    with pytest.raises(ConfigError, match=r"task\.model is"):
        replace(TASK, model=replace(MODEL, matching=False))


def test_without_a_decoder_it_does_not_write():
    params, extra = start()
    task, few, state = writes_not(params, extra)
    (total, (_, metrics)), _ = gradients(task)(few, state, batch(0), jax.random.key(0))
    whole, (_, all_metrics) = loss_among(None)(params, extra, batch(0), jax.random.key(0))
    assert "writing" not in metrics
    np.testing.assert_allclose(total, whole - all_metrics["writing"], rtol=1e-5)
