"""Checkpoints that the published libraries wrote, at random weights: loaded, they compute the same (fp32)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from jaxmm.inference.batching import predictions
from jaxmm.inference.model import load
from jaxmm.pretrained.io.files import FileError
from tests.parity.test_published import close
from tests.training.common import assert_same_bits

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
SIDE, TEXTS = 32, 9
PICTURES = RNG.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
STACK = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80}
VISION = STACK | {"image_size": SIDE, "patch_size": 8}
TEXT = STACK | {"vocab_size": 90, "max_position_embeddings": TEXTS}
WORDS = RNG.integers(2, 80, (3, TEXTS)).astype(np.int32)
WORDS[:, 5], WORDS[:, 6:] = 89, 1


def shaken(model):
    """Biases, norms and tables start at constants; random ones cannot hide a swapped or forgotten parameter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread, middle = (0.05, 0.0) if parameter.ndim > 1 else (0.2, 0.9 if parameter.ndim == 1 else 0.5)
            parameter.copy_(torch.randn(parameter.shape) * spread + middle)
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return load(folder)


def inputs(model):
    """The images as torch's models take them, prepared by `model`."""
    return torch.from_numpy(np.array(model.task.pixels(jnp.asarray(PICTURES))).transpose(0, 3, 1, 2))


def predicted(model, name, **batch):
    batch = {key: jnp.asarray(value) for key, value in ({"image": PICTURES} | batch).items()}
    return predictions(model.task)[name](model.params, batch)


@pytest.mark.parametrize("kind, config", [
    (transformers.ViTForImageClassification, transformers.ViTConfig(**VISION, num_labels=7)),
    (transformers.ViTForImageClassification, transformers.ViTConfig(
        **VISION | {"num_attention_heads": 6, "hidden_act": "gelu_pytorch_tanh"}, num_labels=3)),
    (transformers.DeiTForImageClassification, transformers.DeiTConfig(**VISION, num_labels=7)),
    (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig(**VISION, num_labels=7)),
], ids=["ViT", "ViT tanh", "DeiT", "DeiT distilled"])
@torch.no_grad()
def test_transformers_classifiers(kind, config, tmp_path, record_property):
    theirs = shaken(kind(config))
    ours = saved(theirs, tmp_path)
    close(predicted(ours, "logits"), theirs(inputs(ours)).logits, 1e-4, f"transformers {kind.__name__}",
          record_property)
    assert ours.labels == tuple(config.id2label[i] for i in range(config.num_labels))


@pytest.mark.parametrize("options", [{"save_original_format": False}, {"max_shard_size": "20KB"}],
                         ids=["version 5's names", "shards"])
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "clip", "siglip"])
@torch.no_grad()
def test_transformers_other_files(kind, options, tmp_path):
    theirs = shaken(MODELS[kind]())
    theirs.save_pretrained(tmp_path / "usual")
    theirs.save_pretrained(tmp_path / "other", **options)
    if "max_shard_size" in options:
        assert (tmp_path / "other" / "model.safetensors.index.json").exists()
    usual, other = load(tmp_path / "usual"), load(tmp_path / "other")
    assert usual.config == other.config
    assert_same_bits(usual.params, other.params)


@torch.no_grad()
def test_transformers_vit_with_pooler(tmp_path, record_property):
    theirs = shaken(transformers.ViTModel(transformers.ViTConfig(**VISION)))
    ours = saved(theirs, tmp_path)
    close(predicted(ours, "features"), theirs(inputs(ours)).pooler_output, 1e-4, "transformers ViTModel",
          record_property)


def contrastive(kind):
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config=TEXT | {"projection_size": 48}, vision_config=VISION)
        return transformers.SiglipModel(config)
    eos = 2 if kind == "clip of 2021" else 89
    config = transformers.CLIPConfig(text_config=TEXT | {"eos_token_id": eos, "bos_token_id": 88, "pad_token_id": 1},
                                     vision_config=VISION, projection_dim=32)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize("kind", ["clip", "clip of 2021", "siglip"])
@torch.no_grad()
def test_transformers_two_towers(kind, tmp_path, record_property):
    theirs = shaken(contrastive(kind))
    ours = saved(theirs, tmp_path)
    want = theirs(pixel_values=inputs(ours), input_ids=torch.from_numpy(WORDS).long())
    image, text = predicted(ours, "image"), predicted(ours, "text", tokens=WORDS)
    close(image, want.image_embeds, 2e-5, f"transformers {kind} images", record_property)
    close(text, want.text_embeds, 2e-5, f"transformers {kind} texts", record_property)
    scale, bias = np.exp(ours.params["logit_scale"]), ours.params.get("logit_bias", 0.0)
    close(scale * image @ text.T + bias, want.logits_per_image, 1e-4, f"transformers {kind} logits", record_property)
    if kind == "clip of 2021":
        assert any("eos_token_id is 2" in note for note in ours.notes)


MODELS = {
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=7)),
    "DeiT": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VISION, num_labels=7)),
    "ViTModel": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    "clip": lambda: contrastive("clip"), "clip of 2021": lambda: contrastive("clip of 2021"),
    "siglip": lambda: contrastive("siglip"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_loads_in_transformers_with_the_same_tensors(kind, tmp_path):
    theirs = shaken(MODELS[kind]())
    ours = saved(theirs, tmp_path / "theirs")
    ours.save(tmp_path / "ours", format="transformers")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    wanted, restored = theirs.state_dict(), back.state_dict()
    assert wanted.keys() == restored.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, restored[name]), name
    one, other = theirs.config.to_dict(), back.config.to_dict()
    for name in ("hidden_act", "layer_norm_eps", "image_size", "patch_size", "id2label", "vision_config"):
        if name != "vision_config":
            assert one.get(name) == other.get(name), name
        elif name in one:
            for part in ("hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_attention_heads"):
                assert one[name][part] == other[name][part], part
    again = load(tmp_path / "ours")
    assert (again.config, again.preprocessing) == (ours.config, ours.preprocessing)
    assert again.task.pixels == ours.task.pixels
    with pytest.raises(FileError, match="exists; expected a new folder"):
        ours.save(tmp_path / "ours", format="transformers")


def test_what_does_not_fit_is_listed_whole(tmp_path):
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=7))
    weights = theirs.state_dict()
    name = next(key for key in weights if key.endswith("layernorm.bias"))
    wrong = next(key for key in weights if key.endswith("cls_token"))
    extra, missing = {"surprise": torch.zeros(3)}, weights.pop(name)
    weights[wrong] = torch.zeros(1, 1, len(missing) + 1)
    theirs.save_pretrained(tmp_path, state_dict=weights | extra)
    with pytest.raises(FileError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "1 missing: vit.layernorm.bias" in text and "1 left over: surprise" in text
    assert "1 of another shape: vit.embeddings.cls_token [1, 1, 49], expected [1, 1, 48]" in text


@pytest.mark.parametrize("name, fields", [
    ("vit_tiny_patch16_224", {"img_size": SIDE, "num_classes": 7}),
    ("vit_small_patch32_224", {"img_size": SIDE, "num_classes": 5, "global_pool": "avg"}),
    ("vit_base_patch16_clip_quickgelu_224", {"img_size": SIDE, "num_classes": 7, "depth": 2}),
    ("vit_base_patch16_siglip_224", {"img_size": SIDE, "depth": 2, "num_classes": 0}),
    ("deit_tiny_distilled_patch16_224", {"img_size": SIDE, "num_classes": 7}),
])
@torch.no_grad()
def test_timm(name, fields, tmp_path, record_property):
    timm = pytest.importorskip("timm", reason="no extra names timm: its torchvision has no CPU build")
    from timm.models._hub import save_for_hf
    theirs = shaken(timm.create_model(name, **fields))
    classes = fields["num_classes"]
    theirs.pretrained_cfg = theirs.pretrained_cfg | {"input_size": (3, SIDE, SIDE), "num_classes": classes}
    save_for_hf(theirs, tmp_path, model_config={"num_classes": classes}, safe_serialization=True)
    ours = load(tmp_path)
    got = predicted(ours, "logits" if classes else "features")
    close(got, theirs(inputs(ours)), 1e-4, f"timm {name}", record_property)
    ours.save(tmp_path / "ours", format="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    wanted, restored = theirs.state_dict(), back.state_dict()
    assert wanted.keys() == restored.keys() and all(torch.equal(wanted[key], restored[key]) for key in wanted)
    close(back(inputs(ours)).numpy(), theirs(inputs(ours)), 1e-6, f"timm {name}, saved", record_property)
    assert load(tmp_path / "ours").config == ours.config


class Archive(torch.nn.Module):
    """OpenAI's names and constants around open_clip's modules, to be traced."""

    def __init__(self, clip):
        super().__init__()
        for name, value in (*clip.named_children(), *clip.named_parameters(recurse=False)):
            setattr(self, name, value)
        for name, value in (("input_resolution", SIDE), ("context_length", TEXTS), ("vocab_size", 90)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)

    def forward(self, image, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
        x = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection
        return self.visual(image), x, self.logit_scale.exp(), self.input_resolution + self.context_length


TOWERS = {"embed_dim": 32, "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 128, "patch_size": 8},
          "text_cfg": {"context_length": TEXTS, "vocab_size": 90, "width": 64, "heads": 2, "layers": 2}}


@pytest.mark.parametrize("change", [
    {}, {"quick_gelu": True},
    {"custom_text": True, "init_logit_bias": -10.0, "init_logit_scale": 2.3,
     "text_cfg": TOWERS["text_cfg"] | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
    {"vision_cfg": TOWERS["vision_cfg"] | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
], ids=["CLIP", "quick GELU", "CustomTextCLIP", "pooled mean"])
@torch.no_grad()
def test_open_clip(change, tmp_path, record_property):
    open_clip = pytest.importorskip("open_clip", reason="no extra names open_clip, as timm")
    described = TOWERS | change
    fields = {k: v for k, v in described.items() if k != "custom_text"}
    kind = open_clip.CustomTextCLIP if described.get("custom_text") else open_clip.CLIP
    theirs = shaken(kind(**fields))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    shown = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest", "size": SIDE}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": shown}))
    ours = load(tmp_path)
    image, text = (theirs.encode_image(inputs(ours), normalize=True),
                   theirs.encode_text(torch.from_numpy(WORDS).long(), normalize=True))
    close(predicted(ours, "image"), image, 2e-5, f"open_clip {sorted(change)} images", record_property)
    close(predicted(ours, "text", tokens=WORDS), text, 2e-5, f"open_clip {sorted(change)} texts", record_property)
    ours.save(tmp_path / "ours", format="open_clip")
    config = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"]
    custom = config.pop("custom_text")
    back = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    back.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    back.eval()
    close(np.asarray(back.encode_image(inputs(ours), normalize=True)), image, 1e-6, "open_clip, saved", record_property)
    if change == {"quick_gelu": True}:  # OpenAI's own files have the same names, and no configuration
        torch.save(theirs.state_dict(), tmp_path / "ViT.pt")
        archive = torch.jit.trace(Archive(theirs), (inputs(ours), torch.from_numpy(WORDS).long()), check_trace=False)
        torch.jit.save(archive.half(), tmp_path / "ViT-archive.pt")
        for name, tolerance in (("ViT.pt", 2e-5), ("ViT-archive.pt", 5e-3)):      # an archive's weights are fp16
            openai = load(tmp_path / name)
            assert openai.config == ours.config
            close(predicted(openai, "image"), image, tolerance, f"OpenAI {name} images", record_property)
            close(predicted(openai, "text", tokens=WORDS), text, tolerance, f"OpenAI {name} texts", record_property)
