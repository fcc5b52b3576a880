"""A captioner whose decoder is no transformer, defined here, does what BLIP does: nothing in jaxmm knows of it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.capfilt.synthetic_captions import CaptionOptions, caption_shard, check_captioner
from jaxmm.data.images import decode
from jaxmm.data.sources.registry import open_source
from jaxmm.evals import Captions, EvalContext
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import load
from jaxmm.losses.language_modeling import language_loss
from jaxmm.pretrained.io.files import FileError
from jaxmm.task import Decoder, Task, capabilities
from jaxmm.training.loop import train
from tests.training.common import assert_same_bits, clip_run, restored

pytestmark = pytest.mark.usefixtures("no_java")
GREEDY = Decoding(max_length=9)


@dataclass(frozen=True, kw_only=True)
class RecurrentCaptioning(Task):
    """A gated recurrent unit (Cho et al. 2014) that starts from the image's patches and reads their mean at each step.

    Its cache is one state per row, of which nothing grows with the text.
    """

    width: int = 20
    patch: int = 4
    start_id: int | None = None
    end_id: int | None = None
    pad_id: int | None = None
    reads: ClassVar = ("image", "text")

    def bind(self, *, image_size, classes, tokenizer):
        return replace(self, start_id=tokenizer.vocab_size, end_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)

    def init(self, rng):
        def kernel(key, *shape):
            return jax.random.normal(key, shape) * shape[0]**-0.5

        keys, d = jax.random.split(rng, 5), self.width
        return {"patches": {"kernel": kernel(keys[0], 3 * self.patch**2, d)},
                "tokens": {"embedding": kernel(keys[1], self.start_id + 1, d)},
                "gates": {"kernel": kernel(keys[2], 3 * d, 2 * d)}, "update": {"kernel": kernel(keys[3], 3 * d, d)},
                "head": {"kernel": kernel(keys[4], d, self.start_id + 1)}}

    def image_tokens(self, params, batch):
        image, p = batch["image"] / 255.0 - 0.5, self.patch
        b, height, width, _ = image.shape
        patches = image.reshape(b, height // p, p, width // p, p, 3).swapaxes(2, 3).reshape(b, -1, 3 * p * p)
        return jnp.tanh(patches @ params["patches"]["kernel"])

    def step(self, params, tokens, state, image):
        """Read one token [r] in view of `image` [r d], which begins the state: logits and the new state."""
        x = params["tokens"]["embedding"][tokens]
        reset, keep = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, state, image], axis=1) @ params["gates"]["kernel"]),
                                2, axis=1)
        new = jnp.tanh(jnp.concatenate([x, reset * state, image], axis=1) @ params["update"]["kernel"])
        state = keep * state + (1 - keep) * new
        return state @ params["head"]["kernel"], state

    def logits(self, params, tokens, image, context_mask=None):
        image = jnp.repeat(image, len(tokens) // len(image), axis=0)

        def one(state, column):
            logits, state = self.step(params, column, state, image)
            return state, logits

        return jax.lax.scan(one, image, tokens.T)[1].swapaxes(0, 1)

    def loss(self, params, extra, batch, rng):
        tokens = batch["tokens"].at[:, 0].set(self.start_id)
        logits = self.logits(params, tokens, self.image_tokens(params, batch).mean(axis=1))
        return language_loss(logits, tokens, tokens != self.pad_id, 0.0), (extra, {})

    @property
    def decoder(self):
        def decode_step(params, tokens, position, cache, image, cache_mask, context_mask):
            image = jnp.repeat(image, len(tokens) // len(image), axis=0)
            return self.step(params, tokens, jnp.where(position == 0, image, cache), image)

        return Decoder(
            context=lambda params, batch: (self.image_tokens(params, batch), None),
            prepare=lambda params, image_tokens: image_tokens.mean(axis=1),
            cache=lambda rows, length: jnp.zeros((rows, self.width)), decode_step=decode_step, logits=self.logits,
            start_id=self.start_id, end_id=self.end_id, pad_id=self.pad_id, longest=1000, vocab_size=self.start_id + 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stopped after half of its steps and was resumed, and one that was not."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(clip_run(folder / "data"), task=RecurrentCaptioning(), steps=8)
    train(config, folder / "whole")
    train(replace(config, steps=4), folder / "half")
    train(config, folder / "half")
    return folder, config


def test_it_trains_and_resumes(run):
    folder, _ = run
    assert_same_bits(restored(folder / "half", 8), restored(folder / "whole", 8))
    first, last = (restored(folder / "half", step)["params"]["head"]["kernel"] for step in (4, 8))
    assert np.abs(np.asarray(last) - np.asarray(first)).max() > 1e-4


def images(config, count):
    source = open_source("scenes:tiny/val", data_dir=config.data.data_dir)
    return source, [np.asarray(decode(source[i]["image"])) for i in range(count)]


def test_it_captions(run):
    """Greedily, the likeliest token follows each; beams find texts at least as likely; chosen captions are scored."""
    folder, config = run
    model = load(folder / "half")
    assert capabilities(model.task) == ("writes captions",) and model.num_parameters > 0
    _, some = images(config, 5)
    decoder, batch = model.task.decoder, {"image": model.preprocess(some)}
    image = decoder.prepare(model.params, decoder.context(model.params, batch)[0])
    captions = model.caption(some, decoding=GREEDY)
    likelihood = jax.jit(lambda tokens, image: jax.nn.log_softmax(decoder.logits(model.params, tokens, image)))
    for row, ((text, score),) in enumerate(captions):
        tokens, total = [decoder.start_id], 0.0
        while len(tokens) < GREEDY.max_length and tokens[-1] != decoder.end_id:
            padded = jnp.asarray([tokens + [0] * (GREEDY.max_length - len(tokens))])
            logits = likelihood(padded, image[row:row + 1])[0, len(tokens) - 1]
            tokens.append(int(logits.argmax()))
            total += float(logits.max())
        assert text == model.tokenizer.decode(tokens[1:])
        assert score == pytest.approx(total / (len(tokens) - 1), abs=1e-4)
    assert model.caption(some[0], decoding=GREEDY)[0][0][0] == captions[0][0][0]
    beams = model.caption(some, decoding=replace(GREEDY, beams=4), top=3)
    assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in beams)
    choices = [text for text, _ in beams[0]] + ["two stars"]
    chosen = model.caption(some, choices=choices, top=4)
    assert all({text for text, _ in row} == set(choices) for row in chosen)
    with pytest.raises(ValueError, match="which writes captions; expected one that matches"):
        model.match(some, ["a star"])
    with pytest.raises(ValueError, match="which writes captions; expected one that embeds images"):
        model.encode_image(some)


def test_it_is_saved_and_loaded(run, tmp_path):
    folder, config = run
    model, (_, some) = load(folder / "half"), images(config, 3)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.task == model.task and again.preprocessing == model.preprocessing
    assert_same_bits(again.params, model.params)
    assert again.caption(some, decoding=GREEDY) == model.caption(some, decoding=GREEDY)
    with pytest.raises(FileError, match="which has no RecurrentCaptioning; expected jaxmm"):
        model.save(tmp_path / "other", format="transformers")


def test_it_is_evaluated(run):
    folder, config = run
    model, (source, some) = load(folder / "half"), images(config, 7)
    context = EvalContext(task=model.task, params=model.params, data=config.data, val=source, tokenizer=model.tokenizer)
    evaluator = Captions(decoding=GREEDY, limit=7, batch_size=4, examples=3)
    measured = dict(evaluator.run(context))
    scores = [score for (_, score), in model.caption(some, decoding=GREEDY)]
    assert measured["val/caption_score"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert len(context.examples) == 3 and all(example.words == () for example in context.examples)


def test_it_bootstraps_captions(run):
    folder, config = run
    model = load(folder / "half")
    options = CaptionOptions(decoding=replace(GREEDY, beams=3), captions=2)
    check_captioner(model, "own", options)
    source, some = images(config, len(open_source("scenes:tiny/val", data_dir=config.data.data_dir)))
    texts = caption_shard(source, [model], options).columns
    want = model.caption(some, decoding=options.decoding, top=2)
    for record, captions in enumerate(want):
        synthetic = [text for number, text, captioner in zip(
            texts["record"], texts["text"], texts["captioner"], strict=True) if (number, captioner) == (record, 0)]
        assert synthetic == list(dict.fromkeys(text for text, _ in captions if text))
