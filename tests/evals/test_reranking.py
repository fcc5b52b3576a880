"""Recalls after matching, against a loop over all pairs, one by one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmm.config import DataConfig
from jaxmm.data.transforms import eval_image
from jaxmm.evals import EvalContext, Reranking, Retrieval
from jaxmm.evals import image_text_pairs as module
from jaxmm.inference.matching import match_pairs, pair_batches
from jaxmm.models.blip import BLIP
from jaxmm.validation import ConfigError
from tests.evals.conftest import MemorySource, one_per_image
from tests.pretrained import tiny

COUNT, KS = 11, (1, 2, 4)
WORDS = ["a", "small", "large", "red", "blue", "circle", "square", "two", "green", "stars", "above", "heart"]


@cache
def source(captions):
    """Pictures with 1 to `captions` texts of 1 to 7 words; a picture and a text occur twice."""
    rng = np.random.default_rng(5)
    texts = [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(rng.integers(1, captions + 1)))
             for _ in range(COUNT)]
    images = [rng.integers(0, 256, (14, 14, 3), np.uint8) for _ in range(COUNT)]
    images[8], texts[9] = images[1], (texts[3][0].upper(), *texts[9][1:])
    return MemorySource(images=tuple(images), captions=tuple(texts))


def context(source, mesh=None, model=None):
    model = tiny.matcher() if model is None else model
    return EvalContext(task=model.task, params=model.params, data=DataConfig(image=tiny.IMAGE), val=source, mesh=mesh,
                       tokenizer=tiny.TOKENIZER)


@cache
def pictures_and_texts(captions, first):
    """Every picture with every text: match logits and cosines [n m]; the texts and their owners."""
    model, pairs = tiny.matcher(), one_per_image(source(captions))
    taken = [texts[:1] if first else texts for texts in pairs.captions]
    texts, owner = [text for each in taken for text in each], np.repeat(np.arange(COUNT - 1), list(map(len, taken)))

    @jax.jit
    def both(image, tokens):
        image = model.task.pixels(image)
        variables, apply = {"params": model.params}, BLIP(model.config).apply
        seen = apply(variables, image, train=False, method=BLIP.encode_image)
        cosine = apply(variables, seen, method=BLIP.project_image) @ apply(
            variables, tokens, train=False, method=BLIP.embed_text).T
        return apply(variables, tokens, seen, train=False, method=BLIP.match)[0], cosine[0, 0]

    logits, cosines = np.zeros((2, COUNT - 1, len(texts)))
    for i, j in np.ndindex(*logits.shape):
        picture = eval_image(Image.fromarray(pairs.images[i]), tiny.IMAGE)
        logit, cosines[i, j] = both(jnp.asarray(picture[None]), jnp.asarray(tiny.TOKENIZER(texts[j:j + 1])))
        logits[i, j] = logit[1]
    return logits, cosines, texts, owner


def recalls(logits, cosines, images, texts, owner, candidates, k, score):
    """As published: the candidates of each query by cosine, ordered by logit and cosine; -100 for the others."""
    def right(i, j):
        twins = [p for p in range(len(images)) if np.array_equal(images[p], images[i])]
        return " ".join(texts[j].lower().split()) in {texts[m].lower() for m in range(len(texts)) if owner[m] in twins}

    found = []
    for logit, cosine, turned in ((logits, cosines, False), (logits.T, cosines.T, True)):
        hits = []
        for q in range(len(logit)):
            scores = np.full(len(logit[q]), -100.0)
            for item in np.argsort(-cosine[q])[:candidates]:
                scores[item] = logit[q, item] + (cosine[q, item] if score == "itm+itc" else 0)
            ranked = [item for item in np.argsort(-scores)[:k] if scores[item] > -100]
            hits.append(any(right(item, q) if turned else right(q, item) for item in ranked))
        found.append(np.mean(hits))
    return found


@pytest.mark.parametrize("captions, candidates, score", [
    ("all", 5, "itm+itc"), ("all", 5, "itm"), ("all", 100, "itm+itc"), ("first", 4, "itm+itc")])
def test_against_a_loop_over_all_pairs(captions, candidates, score, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 60)                   # several chunks, the last one ragged
    logits, cosines, texts, owner = pictures_and_texts(3, captions == "first")
    evaluator = Reranking(captions=captions, candidates=candidates, score=score, ks=KS, batch_size=4)
    seen = context(source(3))
    got = dict(evaluator.run(seen))
    want = [recalls(logits, cosines, one_per_image(source(3)).images, texts, owner, candidates, k, score) for k in KS]
    names = [f"val/{way}_itm_recall@{k}" for way in ("i2t", "t2i") for k in KS]
    assert tuple(got) == evaluator.metrics(seen) == tuple(names)
    assert got == pytest.approx(dict(zip(names, np.transpose(want).ravel(), strict=True)))
    assert 0 < got["val/i2t_itm_recall@4"] < 1


def test_the_head_changes_the_order_and_a_pool_is_by_itself():
    logits, cosines, texts, owner = pictures_and_texts(3, False)
    want = []
    for start in (0, 5):
        rows, columns = slice(start, start + 5), (owner >= start) & (owner < start + 5)
        want.append([recalls(logits[rows, columns], cosines[rows, columns], one_per_image(source(3)).images[rows],
                             [text for text, here in zip(texts, columns, strict=True) if here], owner[columns] - start,
                             3, k, "itm+itc") for k in (1, 2)])
    got = dict(Reranking(pool=5, candidates=3, ks=(1, 2)).run(context(source(3))))
    np.testing.assert_allclose(list(got.values()), np.mean(want, axis=0).T.ravel())
    assert list(got.values()) != list(dict(Retrieval(pool=5, ks=(1, 2), examples=0).run(context(source(3)))).values())


def test_over_devices():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    evaluator = Reranking(candidates=5, ks=KS, batch_size=4)
    assert dict(evaluator.run(context(source(3), mesh))) == dict(evaluator.run(context(source(3))))


def test_every_pair_is_matched_once_behind_its_own_picture():
    """Unordered pairs, some pictures with more texts than fit into a call, one without; texts cut where they end."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, (30, 21))
    for row, length in zip(tokens, rng.integers(1, 22, 30), strict=True):
        row[length:] = 0
    wanted = np.unique(rng.integers(0, [5, 30], (90, 2)), axis=0)
    wanted = rng.permutation(wanted[wanted[:, 0] != 2])
    seen = np.arange(5)[:, None, None] * np.ones((1, 2, 3))
    times, shapes = np.zeros(len(wanted), int), set()
    for batch in pair_batches(seen, tokens, *wanted.T, pad_id=0, size=4):
        shapes.add(batch["tokens"].shape)
        assert batch["image_tokens"].shape == (4, 2, 3)
        for row in np.flatnonzero(batch["mask"]):
            for place in np.flatnonzero(batch["pair"][row] >= 0):
                pair = batch["pair"][row, place]
                times[pair] += 1
                picture, text = wanted[pair]
                assert (batch["image_tokens"][row] == picture).all()
                there = batch["tokens"][row, place]
                assert (there == tokens[text, :len(there)]).all() and not tokens[text, len(there):].any()
    assert (times == 1).all()
    assert shapes <= {(4, 8, width) for width in (8, 16, 21)}


def test_no_pairs_no_logits():
    model, none = tiny.matcher(), np.zeros(0, int)
    found = match_pairs(model.task, model.params, np.zeros((3, 10, 24), np.float32), np.ones((2, 4), int), none, none,
                        None)
    assert found.shape == (0, 2)


def test_what_cannot_run_is_refused():
    wanted = "Reranking needs a task that embeds images, embeds texts, matches images and texts; "
    for model, message in ((tiny.clip(), wanted + "ContrastiveLearning embeds images, embeds texts"),
                           (tiny.captioner(), wanted + "Captioning .*writes captions")):
        with pytest.raises(ConfigError, match=message):
            Reranking().check(context(source(3), model=model))
    with pytest.raises(ConfigError, match=r"evals\.candidates is 8; expected at least the largest of evals\.ks"):
        Reranking(candidates=8)
