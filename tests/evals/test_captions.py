"""Captions of held-out pictures against the ones that they have."""

from dataclasses import dataclass

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from jaxmm.config import DataConfig
from jaxmm.evals import Captions, EvalContext
from jaxmm.evals.ptb import ptb_tokens
from jaxmm.inference.generate import Decoding
from jaxmm.validation import ConfigError
from tests.evals.conftest import MemorySource
from tests.pretrained import tiny

pytestmark = pytest.mark.usefixtures("no_java")
DECODING = Decoding(beams=2, max_length=9)


def context(source, model=None):
    model = tiny.captioner() if model is None else model
    return EvalContext(task=model.task, params=model.params, data=DataConfig(image=tiny.IMAGE), val=source,
                       tokenizer=tiny.TOKENIZER)


def test_share_of_captions_that_are_exact():
    images, model = tiny.pictures(7), tiny.captioner()
    # in the evaluator's batches of four, so that one program does for both
    written = [best[0] for part in (images[:4], images[4:]) for best in model.caption(part, decoding=DECODING)]
    texts = [("a star", text.upper()) if i % 3 else ("a heart",) for i, (text, _) in enumerate(written)]
    source = MemorySource(images=tuple(images), captions=tuple(texts))
    # a model that has learned nothing also writes what no text becomes
    exact = [i % 3 > 0 and tiny.TOKENIZER.decode(tiny.TOKENIZER([text])[0]) == text
             for i, (text, _) in enumerate(written)]
    assert 0 < sum(exact) < 7
    evaluator, run = Captions(decoding=DECODING, batch_size=4, examples=3), context(source)
    got = dict(evaluator.run(run))
    assert tuple(got) == evaluator.metrics(run) == tuple(f"val/{name}" for name in (
        "caption_exact", "caption_score", "bleu@1", "bleu@2", "bleu@3", "bleu@4", "rouge_l", "cider"))
    truth = {i: [" ".join(ptb_tokens(text)) for text in row] for i, row in enumerate(texts)}
    guess = {i: [" ".join(ptb_tokens(text))] for i, (text, _) in enumerate(written)}
    want = [*Bleu(4).compute_score(truth, guess, verbose=0)[0], Rouge().compute_score(truth, guess)[0],
            Cider().compute_score(truth, guess)[0]]
    np.testing.assert_allclose(list(got.values())[2:], want, rtol=1e-12)
    assert got["val/caption_exact"] == pytest.approx(np.mean(exact))
    assert got["val/caption_score"] == pytest.approx(np.mean([score for _, score in written]), abs=1e-4)
    chosen = [(written[i][0], exact[i], texts[i][0]) for i in (0, 3, 6)]
    assert [(example.caption, example.right, example.truth) for example in run.examples] == chosen
    for example in run.examples:
        words = "".join(word for word, _ in example.words)
        assert words == "a" + example.caption.removeprefix("##").replace(" ", "") and example.image.shape == (12, 12, 3)
        assert all(look.shape == (3, 3) and 0 < look.sum() < 1 for _, look in example.words)
    limited = dict(Captions(decoding=DECODING, batch_size=4, limit=3, examples=0).run(context(source)))
    assert limited["val/caption_exact"] == pytest.approx(np.mean(exact[:3]))


def test_scenes_tell_what_is_largest():
    @dataclass(frozen=True)
    class Scenes(MemorySource):
        grades_captions = True

        def names_largest(self, index, caption):
            return index % 3 > 0

        def is_true(self, index, caption):
            return index == 2

    source = Scenes(images=tuple(tiny.pictures(7)), captions=(("a star",),) * 7)
    evaluator = Captions(decoding=DECODING, batch_size=4, examples=0)
    got = dict(evaluator.run(context(source)))
    assert tuple(got) == evaluator.metrics(context(source)) and got["val/caption_largest"] == pytest.approx(4 / 7)
    assert got["val/caption_true"] == pytest.approx(1 / 7)


def test_who_does_not_write_is_refused():
    source = MemorySource(images=tuple(tiny.pictures(2)), captions=(("a",), ("b",)))
    for model in (tiny.clip(), tiny.matcher()):
        with pytest.raises(ConfigError, match=r"Captions needs a task that writes captions; .*embeds texts"):
            Captions().check(context(source, model))
