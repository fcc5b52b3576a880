"""iGPT against transformers' ImageGPT at random weights: logits, features, greedy continuation, tokens, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

from jaxmm.data.transforms import eval_image
from jaxmm.inference.generate import Decoding, generate
from jaxmm.inference.model import load
from jaxmm.models.igpt import igpt
from jaxmm.nn.palette import fit_palette
from jaxmm.pretrained.families import transformers_igpt
from tests.parity.test_published import close
from tests.training.common import assert_same_bits

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
ARCHITECTURES = {
    "small": {"n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": 22, "n_positions": 15**2},
    "other": {"n_embd": 40, "n_layer": 4, "n_head": 5, "vocab_size": 65, "n_positions": 15**2, "n_inner": 72,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-3}}


def processor(colors, side):
    clusters = RNG.uniform(-1, 1, (colors, 3)).round(4).tolist()
    return {"image_processor_type": "ImageGPTImageProcessor", "clusters": clusters, "do_normalize": True,
            "do_resize": True, "resample": 2, "size": {"height": side, "width": side}}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory):
    """Theirs and ours, from files that they wrote; weights so large that tokens depend on each other."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.ImageGPTConfig(**ARCHITECTURES[request.param], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    theirs = transformers.ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.15 + (parameter.ndim == 1))
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor(config.vocab_size - 1, 15)))
    return theirs, load(folder), folder


def shifted(tokens, start):
    return np.concatenate([np.full((len(tokens), 1), start), tokens[:, :-1]], axis=1)


@torch.no_grad()
def test_logits_and_features(pair, record_property):
    theirs, ours, _ = pair
    colors = ours.config.colors
    tokens = shifted(RNG.integers(0, colors, (3, 225)), colors)
    want = theirs(input_ids=torch.from_numpy(tokens), output_hidden_states=True)
    out = jax.jit(lambda p, t: ours.module.apply({"params": p}, t))(ours.params, jnp.asarray(tokens))
    close(out.logits, want.logits, 1e-4, f"ImageGPT of width {theirs.config.n_embd}, logits", record_property)
    features = [theirs.transformer.h[layer].ln_1(hidden).mean(dim=1)
                for layer, hidden in enumerate(want.hidden_states[:theirs.config.n_layer])]
    close(out.layers, torch.stack(features, dim=1), 1e-4, f"ImageGPT of width {theirs.config.n_embd}, features",
          record_property)


@torch.no_grad()
def test_greedy_continuation_of_200_pixels(pair):
    theirs, ours, _ = pair
    decoder = ours.task.decoder
    prompt = shifted(RNG.integers(0, decoder.vocab_size, (4, 26)), decoder.start_id)
    given = torch.from_numpy(prompt)
    want = theirs.generate(given, attention_mask=torch.ones_like(given), max_length=226, do_sample=False).numpy()
    run = jax.jit(lambda p, tokens: generate(decoder, p, None, tokens, jnp.full(4, 26), jax.random.split(
        jax.random.key(0), 4), Decoding(max_length=226)).tokens[:, 0])
    got = np.asarray(run(ours.params, jnp.asarray(prompt, jnp.int32)))
    assert got.shape == want.shape == (4, 226) and len(np.unique(want[:, 26:])) > 5
    np.testing.assert_array_equal(got, want)


def test_files_both_ways(pair, tmp_path):
    """Nothing is missing or left over in either direction; `.bin` files hold the same."""
    theirs, ours, folder = pair
    ours.save(tmp_path / "ours", format="transformers")
    again, info = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "ours",
                                                                             output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], value)
    assert again.config.to_diff_dict().items() >= ARCHITECTURES["small"].items() or theirs.config.n_embd == 40
    (folder / "bin").mkdir()
    torch.save(theirs.state_dict(), folder / "bin" / "pytorch_model.bin")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / "bin" / name).write_text((folder / name).read_text())
    assert_same_bits(load(folder / "bin").params, ours.params)


def test_tokens_of_photographs(record_property):
    """At most 0.1 % of the tokens differ: pixels as near to two colours as rounding."""
    photographs = load_sample_images().images
    palette = fit_palette(np.concatenate([image.reshape(-1, 3) for image in photographs])[::7], 512)
    clusters = np.array(palette.colors)
    config = processor(512, 32) | {"clusters": clusters.tolist()}
    image, same = transformers_igpt.read_processor(config, igpt("S"))
    assert same == palette
    for name in ("version 4", "installed"):
        differing, total = 0, 0
        for photograph in photographs:
            if name == "version 4":                             # numpy, fp64
                pixels = np.asarray(Image.fromarray(photograph).resize((32, 32), Image.Resampling.BILINEAR))
                flat = pixels.reshape(-1, 3) * (1 / 127.5) - 1
                want = (np.square(flat).sum(axis=1)[:, None] - 2 * flat @ clusters.T
                        + np.square(clusters).sum(axis=1)[None]).argmin(axis=1)
            else:
                kind = getattr(transformers, "ImageGPTImageProcessorPil", transformers.ImageGPTImageProcessor)
                made = kind(**{key: value for key, value in config.items() if key != "image_processor_type"})
                want = np.asarray(made(Image.fromarray(photograph), return_tensors="np")["input_ids"]).reshape(-1)
            got = np.asarray(palette.to_tokens(eval_image(Image.fromarray(photograph), image)))
            differing, total = differing + (got != want).sum(), total + want.size
        record_property(f"tokens of photographs that differ from transformers' processor ({name})",
                        f"{differing} of {total}")
        assert differing <= total / 1000
