"""One record per caption and one per image give the same figures, by their definitions."""

import json
from itertools import combinations

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from jaxmm.config import DataConfig
from jaxmm.evals import Captions, EvalContext, Reranking, Retrieval
from jaxmm.evals.by_image import ByImage, Identity, by_image, group_images
from jaxmm.evals.opened_sources import OpenedSources
from jaxmm.evals.ptb import ptb_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.inference.result_files import number_of, result_id
from tests.evals.conftest import Letters, MemorySource
from tests.pretrained import tiny

COUNTS = (3, 1, 2, 4, 1, 3, 2)
"""Captions of each image: unequal numbers."""


def texts(counts=COUNTS, seed=3):
    rng = np.random.default_rng(seed)
    words = ["red", "blue", "circle", "square", "two", "green", "stars", "above", "heart", "small"]
    made = [tuple(" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(count)) for count in counts]
    made[4] = (made[0][1].upper(),)                             # the same words under two images
    return made


def by_caption(images, captions, ids=None, order=None):
    """One record per caption."""
    rows = [(image, (text,), number) for number, (image, row) in enumerate(zip(images, captions, strict=True))
            for text in row]
    rows = rows if order is None else [rows[i] for i in order]
    return MemorySource(images=tuple(row[0] for row in rows), captions=tuple(row[1] for row in rows),
                        image_ids=() if ids is None else tuple(ids[row[2]] for row in rows))


def definition(image, text, owner, words, k):
    """Recall at k by counting, for each query, the wrong items that score as high as the best right one."""
    right = np.array([[owner[j] == i or words[j].lower() in {words[m].lower() for m in np.flatnonzero(owner == i)}
                       for j in range(len(text))] for i in range(len(image))])
    score = image @ text.T
    found = []
    for s, r in ((score, right), (score.T, right.T)):
        best = np.where(r, s, -np.inf).max(axis=1)
        found.append(np.mean(((s >= best[:, None]) & ~r).sum(axis=1) < k))
    return found


@pytest.mark.parametrize("kind", ["content", "id", "shuffled"])
@pytest.mark.parametrize("captions", ["all", "first"])
def test_retrieval_by_record_and_by_image(kind, captions, context, params, pictures):
    images, rows = pictures(len(COUNTS), 1), texts()
    order = None
    if kind == "shuffled":                                      # the first caption of each image stays its first
        order = np.argsort(np.random.default_rng(0).random(sum(COUNTS)))
        starts = np.repeat(np.cumsum((0, *COUNTS[:-1])), COUNTS)
        order = sorted(order, key=lambda row: (row != starts[row]))
    ids = [f"n{i}" for i in range(len(COUNTS))] if kind == "id" else None
    if kind == "id":                                            # one image, encoded twice
        lines = by_caption(images, rows, ids)
        changed = list(lines.images)
        changed[-1] = np.ascontiguousarray(changed[-1][::-1])
        lines = MemorySource(images=tuple(changed), captions=lines.captions, image_ids=lines.image_ids)
    else:
        lines = by_caption(images, rows, ids, order)
    assert len(by_image(lines)) == len(COUNTS)
    grouped = MemorySource(images=images, captions=tuple(rows))
    assert by_image(grouped) is grouped
    evaluator = Retrieval(captions=captions, ks=(1, 2, 3), examples=4, batch_size=4)
    one, other = context(grouped), context(lines)
    want = dict(evaluator.run(one))
    assert dict(evaluator.run(other)) == want
    if kind == "content":                                       # the report shows the same captions and images
        assert [[r.item if isinstance(r.item, str) else r.item.tobytes() for r in e.results] for e in other.examples
                ] == [[r.item if isinstance(r.item, str) else r.item.tobytes() for r in e.results]
                      for e in one.examples]
    taken = [row[:1] if captions == "first" else row for row in rows]
    words, owner = [text for row in taken for text in row], np.repeat(np.arange(len(COUNTS)), list(map(len, taken)))
    x = np.stack(images).reshape(len(images), -1) / np.float32(255) @ params["image"]
    t = params["text"][Letters()(words)].sum(axis=1)
    x, t = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, t))
    for k in (1, 2, 3):
        i2t, t2i = definition(x, t, owner, words, k)
        assert (want[f"val/i2t_recall@{k}"], want[f"val/t2i_recall@{k}"]) == pytest.approx((i2t, t2i))
    assert 0 < want["val/t2i_recall@2"] < 1


def test_pools_are_of_images(context, pictures):
    images, rows = pictures(len(COUNTS), 2), texts()
    lines = by_caption(images, rows)
    evaluator = Retrieval(pool=3, ks=(1, 2))
    assert dict(evaluator.run(context(lines))) == dict(evaluator.run(context(MemorySource(
        images=images, captions=tuple(rows)))))
    with pytest.raises(ValueError, match=r"Retrieval\.pool is 8; expected at most the 7 images"):
        Retrieval(pool=8).check(context(lines))


def test_groups_against_every_pair():
    rng = np.random.default_rng(0)
    identities = [Identity(tuple(rng.choice([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h", b"i"],
                                            rng.integers(0, 3), replace=False).tolist()), bool(rng.integers(2)))
                  for _ in range(14)]
    linked = [{i} for i in range(14)]
    for _ in range(14):
        for i, j in combinations(range(14), 2):
            if {key for a in linked[i] for key in identities[a].keys} & {
                    key for a in linked[j] for key in identities[a].keys}:
                linked[i] |= linked[j]
                linked[j] |= linked[i]
    groups = group_images(identities)
    assert sorted(map(sorted, groups)) == sorted(map(sorted, {frozenset(group) for group in linked}))
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)
    for group in groups:
        assert [identities[i].has_text for i in group] == sorted((identities[i].has_text for i in group), reverse=True)
    assert 3 < len(groups) < 12


def test_what_cannot_be_read_is_by_itself(context, pictures):
    images, rows = pictures(len(COUNTS), 2), texts()
    lines, grouped = by_caption(images, rows), MemorySource(images=images, captions=tuple(rows))
    broken = MemorySource(images=(b"broken", *lines.images, b"no image"),
                          captions=(("lost",), *lines.captions, ("lost", "too")))
    assert len(by_image(broken)) == len(COUNTS) + 2
    assert dict(Retrieval().run(context(broken))) == dict(Retrieval().run(context(grouped)))


def test_reranking_by_record_and_by_image():
    model, images, rows = tiny.matcher(), tuple(tiny.pictures(len(COUNTS))), texts()

    def run(source):
        return dict(Reranking(candidates=3, ks=(1, 2), batch_size=4).run(EvalContext(
            task=model.task, params=model.params, data=DataConfig(image=tiny.IMAGE), val=source,
            tokenizer=tiny.TOKENIZER)))

    want = run(MemorySource(images=images, captions=tuple(rows)))
    assert run(by_caption(images, rows)) == want and 0 < want["val/t2i_itm_recall@2"] < 1


@pytest.mark.usefixtures("no_java")
def test_captions_by_record_and_by_image(tmp_path):
    model, images, rows = tiny.captioner(), tuple(tiny.pictures(len(COUNTS))), texts()
    decoding = Decoding(beams=2, max_length=9)

    def run(source, **options):
        return dict(Captions(decoding=decoding, batch_size=4, examples=2, **options).run(EvalContext(
            task=model.task, params=model.params, data=DataConfig(image=tiny.IMAGE), val=source,
            tokenizer=tiny.TOKENIZER)))

    grouped, lines = MemorySource(images=images, captions=tuple(rows)), by_caption(images, rows, list("3142576"))
    want = run(grouped)
    file = tmp_path / "new" / "captions.json"
    assert run(lines, results=str(file)) == want
    written = [best[0][0] for part in (images[:4], images[4:]) for best in model.caption(part, decoding=decoding)]
    assert json.loads(file.read_text()) == [{"image_id": number, "caption": text}
                                            for number, text in zip((3, 1, 4, 2, 5, 7, 6), written, strict=True)]
    truth = {i: [" ".join(ptb_tokens(text)) for text in row] for i, row in enumerate(rows)}
    guess = {i: [" ".join(ptb_tokens(text))] for i, text in enumerate(written)}
    assert want["val/cider"] == pytest.approx(Cider().compute_score(truth, guess)[0])
    assert run(lines, limit=3) == run(grouped, limit=3) != want


def test_a_view_has_all_captions_and_reads_the_first_record_with_one(pictures):
    a, b = pictures(2, 5)
    source = MemorySource(images=(a, b, a, a), captions=((" ",), ("x",), ("second", "third"), ("fourth",)))
    view = by_image(source)
    assert isinstance(view, ByImage) and view.groups == ((2, 3, 0), (1,))
    assert view.texts(0) == ("second", "third", "fourth") == view[0]["texts"] and view.key(1) == "1"
    opened = OpenedSources()
    assert opened.by_image(source) is opened.by_image(source)
    wide = MemorySource(images=(np.ones((2, 8, 3), np.uint8), np.ones((4, 4, 3), np.uint8)), captions=(("x",), ("y",)))
    assert by_image(wide) is wide                               # the same bytes in another shape


def test_ids_of_results():
    for name, number in (("COCO_val2014_000000391895.jpg", 391895), ("7", 7), ("a/12.png", 12), ("cat.jp2", "cat.jp2"),
                         ("x9y", "x9y"), ("0042", 42)):
        assert number_of(name) == number
    for record, number in (({"key": "a/000123.jpg#7"}, 123), ({"key": "a/cat.jpg#7"}, "a/cat.jpg"),
                           ({"key": "x", "image_id": "00391"}, 391), ({"key": "x", "image_id": "n3"}, "n3"),
                           ({"key": "x", "image_id": "COCO_val2014_000000000009.jpg"}, 9)):
        assert result_id(record, "image_id") == number
    assert result_id({"key": "x#1", "question_id": 458752000}, "question_id") == 458752000
