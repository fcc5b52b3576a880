import numpy as np
import pytest

from jaxmm.evals import Retrieval, RetrievalExample
from jaxmm.evals import image_text_pairs as module
from tests.evals.conftest import LinearTask, MemorySource, numpy_outputs, one_per_image

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def captioned(pictures, n, captions, seed=0):
    """Pictures with 1 to `captions` texts; some pictures and some texts occur twice."""
    rng = np.random.default_rng(seed)
    images = list(pictures(n, seed))
    texts = [tuple("".join(rng.permutation(LETTERS)[:6]) for _ in range(rng.integers(1, captions + 1)))
             for _ in range(n)]
    images[5], texts[7] = images[2], (texts[3][0].upper() + "  ", *texts[7])
    return MemorySource(tuple(images), captions=tuple(texts))


def brute_force(image, text, owner, images, texts, k):
    """Recall at k by sorting every list, one pair at a time."""
    def right(i, j):
        twins = [p for p in range(len(images)) if np.array_equal(images[p], images[i])]
        words = {" ".join(texts[m].lower().split()) for m in range(len(texts)) if owner[m] in twins}
        return " ".join(texts[j].lower().split()) in words

    similarity = image @ text.T
    i2t = [any(right(i, j) for j in np.argsort(-similarity[i])[:k]) for i in range(len(image))]
    t2i = [any(right(i, j) for i in np.argsort(-similarity[:, j])[:k]) for j in range(len(text))]
    return np.mean(i2t), np.mean(t2i)


def embeddings(params, source, texts):
    x, _, t = numpy_outputs(params, source, texts)
    return x / np.linalg.norm(x, axis=1, keepdims=True), t / np.linalg.norm(t, axis=1, keepdims=True)


@pytest.mark.parametrize("captions", ["first", "all"])
def test_against_brute_force(captions, mesh, context, params, pictures, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)                  # several chunks, the last one ragged
    records = captioned(pictures, 23, 3)
    source = one_per_image(records)
    taken = [t[:1] if captions == "first" else t for t in source.captions]
    texts, owner = [w for t in taken for w in t], np.repeat(np.arange(22), [len(t) for t in taken])
    image, text = embeddings(params, source, texts)
    got = dict(Retrieval(captions=captions, batch_size=8).run(context(records, mesh)))
    want = {}
    for k in (1, 5, 10):
        want[f"val/i2t_recall@{k}"], want[f"val/t2i_recall@{k}"] = brute_force(
            image, text, owner, source.images, texts, k)
    assert got == pytest.approx(want)
    assert 0 < got["val/i2t_recall@5"] < 1


def test_pools_are_cut_in_order_and_the_rest_is_left_out(context, params, pictures):
    records = captioned(pictures, 23, 3, seed=1)
    source = one_per_image(records)
    got = dict(Retrieval(pool=10, ks=(1, 3)).run(context(records)))
    shares = []
    for start in (0, 10):
        rows = slice(start, start + 10)
        texts = [w for t in source.captions[rows] for w in t]
        owner = np.repeat(np.arange(10), [len(t) for t in source.captions[rows]])
        image, text = embeddings(params, MemorySource(source.images[rows]), texts)
        shares.append([brute_force(image, text, owner, source.images[rows], texts, k) for k in (1, 3)])
    want = np.mean(shares, axis=0)
    assert got == pytest.approx({"val/i2t_recall@1": want[0, 0], "val/t2i_recall@1": want[0, 1],
                                 "val/i2t_recall@3": want[1, 0], "val/t2i_recall@3": want[1, 1]})


@pytest.mark.parametrize("fill", [1.0, np.nan, np.inf, 0.0])
def test_a_collapsed_model_scores_nothing(fill, context, params, pictures):
    source = MemorySource(pictures(37), captions=tuple((f"{i:02d}", f"{i:02d}x") for i in range(37)))
    flat = {k: np.full_like(v, fill) for k, v in params.items()}
    task = LinearTask(normalised=fill != 0.0)
    for captions in ("first", "all"):
        got = dict(Retrieval(captions=captions).run(context(source, params=flat, task=task)))
        assert set(got.values()) == {0.0}


def test_the_texts_of_a_broken_picture_are_left_out(context, pictures):
    good = captioned(pictures, 12, 3, seed=2)
    broken = MemorySource((b"broken", *good.images), captions=(("a lost text", "and another"), *good.captions))
    assert dict(Retrieval().run(context(broken))) == dict(Retrieval().run(context(good)))


def test_pictures_without_texts_distract_but_do_not_ask(context, params, pictures):
    source = one_per_image(captioned(pictures, 13, 2, seed=3))
    texts = ((), *source.captions[1:])
    got = dict(Retrieval(ks=(1,)).run(context(MemorySource(source.images, captions=texts))))
    flat, owner = [w for t in texts for w in t], np.repeat(np.arange(12), [len(t) for t in texts])
    image, text = embeddings(params, source, flat)
    # the first picture's row is dropped from the mean: brute force counts it as a miss
    i2t, t2i = brute_force(image, text, owner, source.images, flat, 1)
    assert got == pytest.approx({"val/i2t_recall@1": i2t * 12 / 11, "val/t2i_recall@1": t2i})


def test_examples_show_what_was_found(context, params, pictures):
    source = one_per_image(captioned(pictures, 16, 3, seed=4))
    ctx = context(source)
    dict(Retrieval(examples=4).run(ctx))
    assert len(ctx.examples) == 8 and all(isinstance(e, RetrievalExample) for e in ctx.examples)
    texts = [w for t in source.captions for w in t]
    owner = np.repeat(np.arange(15), [len(t) for t in source.captions])
    image, text = embeddings(params, source, texts)
    last = ctx.examples[3]                                     # the last picture
    best = np.argsort(-image[14] @ text.T)[:3]
    assert [r.item for r in last.results] == [texts[j] for j in best]
    assert [r.right for r in last.results] == [bool(owner[j] == 14) for j in best]
    np.testing.assert_allclose([r.score for r in last.results], (image[14] @ text.T)[best], rtol=1e-4)
    first = ctx.examples[4]                                    # the first text
    best = np.argsort(-image @ text[0])[:5]
    assert first.query == texts[0]
    for result, i in zip(first.results, best, strict=True):
        np.testing.assert_array_equal(result.item, source.images[i])
        assert result.right == (i == 0)


def test_a_pool_larger_than_the_source_is_refused(context, pictures):
    with pytest.raises(ValueError, match=r"Retrieval\.pool is 100; expected at most the 11 images"):
        Retrieval(pool=100).check(context(captioned(pictures, 12, 1)))
