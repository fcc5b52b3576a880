"""Our towers against transformers' at the same random weights, fp32: the largest absolute difference is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxmm.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmm.models.vit import ViT, ViTConfig
from jaxmm.nn.transformer import TransformerConfig

pytestmark = pytest.mark.parity
WIDTH, HEADS, DEPTH, MLP = 48, 3, 3, 80
RNG = np.random.default_rng(0)


def shaken(model):
    """Biases, norms and tables start at constants; random ones cannot hide a swapped or forgotten parameter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.1 if p.ndim > 1 else 0.3) + (1.0 if p.ndim == 1 else 0.0) * 0.1)
    return model.eval(), {k: v.numpy() for k, v in model.state_dict().items()}


def stacked(weights, prefix, names):
    """Our stacked layers from theirs, `names` mapping our parts to their keys in a layer."""
    def tensor(layer, ours, theirs, kind):
        w = weights[f"{prefix}.{layer}.{theirs}.{kind}"]
        kind = {"weight": "kernel", "bias": "bias"}[kind]
        part = ours.rsplit("/", 1)[-1]
        if part in ("query", "key", "value"):
            width = w.shape[-1] if kind == "kernel" else len(w)
            heads = (HEADS, width // HEADS)
            return w.T.reshape(width, *heads) if kind == "kernel" else w.reshape(heads)
        if part == "out" and kind == "kernel":
            return w.T.reshape(HEADS, w.shape[0] // HEADS, w.shape[0])
        return w.T if kind == "kernel" else w

    tree = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            leaf = {"weight": "scale" if "norm" in ours else "kernel", "bias": "bias"}[kind]
            value = np.stack([tensor(i, ours, theirs, kind) for i in range(DEPTH)])
            node = tree
            *path, last = [*ours.split("/"), leaf]
            for name in path:
                node = node.setdefault(name, {})
            node[last] = value
    return {"blocks": tree}


def norm(weights, key):
    return {"scale": weights[f"{key}.weight"], "bias": weights[f"{key}.bias"]}


def dense(weights, key):
    return {"kernel": weights[f"{key}.weight"].T, "bias": weights[f"{key}.bias"]}


CLIP_LAYER = {
    "attention_norm": "layer_norm1", "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj", "attention/out": "self_attn.out_proj", "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
}


def same_tree(ours, config_init):
    """The weights we made must be exactly the parameters the module has."""
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(config_init))
    assert jax.tree.map(np.shape, ours) == shapes


def close(ours, theirs, tolerance, name, record_property):
    """Check that the largest absolute difference is below `tolerance`, and show it at the end."""
    difference = float(np.abs(np.asarray(ours) - theirs.numpy()).max())
    record_property(f"{name}, largest absolute difference", f"{difference:.1e}")
    assert difference < tolerance


def as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_vit(record_property):
    config = transformers.ViTConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
                                    intermediate_size=MLP, image_size=20, patch_size=5, layer_norm_eps=1e-12,
                                    num_labels=7)
    theirs, w = shaken(transformers.ViTForImageClassification(config))
    prefix = "vit.layers" if "vit.layers.0.layernorm_before.weight" in w else "vit.encoder.layer"
    new = f"{prefix}.0.attention.q_proj.weight" in w
    names = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after"}
    if new:
        names |= {f"attention/{a}": f"attention.{b}_proj" for a, b in
                  (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))}
        names |= {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
    else:
        names |= {f"attention/{a}": f"attention.attention.{a}" for a in ("query", "key", "value")}
        names |= {"attention/out": "attention.output.dense", "mlp/up": "intermediate.dense", "mlp/down": "output.dense"}
    params = {
        "patches": {"kernel": w["vit.embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0),
                    "bias": w["vit.embeddings.patch_embeddings.projection.bias"]},
        "positions": w["vit.embeddings.position_embeddings"][0],
        "class_token": w["vit.embeddings.cls_token"][0, 0],
        "encoder": stacked(w, prefix, names), "norm": norm(w, "vit.layernorm"), "head": dense(w, "classifier"),
    }
    ours = ViT(ViTConfig(transformer=TransformerConfig(width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=MLP, eps=1e-12),
                         image_size=20, patch=5, classes=7))
    image = RNG.standard_normal((2, 20, 20, 3), np.float32)
    same_tree(params, lambda: ours.init(jax.random.key(0), jnp.asarray(image), train=False)["params"])
    out = ours.apply(as_arrays({"params": params}), jnp.asarray(image), train=False, hidden=True)
    with torch.no_grad():
        want = theirs(torch.tensor(image.transpose(0, 3, 1, 2)), output_hidden_states=True)
    close(out.logits, want.logits, 1e-4, "ViT logits", record_property)
    for layer in range(DEPTH - 1):
        close(out.hidden[layer], want.hidden_states[layer + 1], 1e-4, f"ViT layer {layer}", record_property)


def clip_like(siglip: bool):
    common = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
              "intermediate_size": MLP}
    text = common | {"vocab_size": 90, "max_position_embeddings": 9}
    vision = common | {"image_size": 20, "patch_size": 5}
    if siglip:
        config = transformers.SiglipConfig(text_config=text | {"projection_size": WIDTH}, vision_config=vision)
        return shaken(transformers.SiglipModel(config))
    text |= {"eos_token_id": 89, "bos_token_id": 88, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return shaken(transformers.CLIPModel(config))


def tokens():
    ids = RNG.integers(2, 80, (3, 9)).astype(np.int32)
    ids[0, 4], ids[1, 8], ids[2, 6] = 89, 89, 89
    ids[0, 5:], ids[2, 7:] = 1, 1
    return ids


def images():
    return RNG.standard_normal((3, 20, 20, 3), np.float32)


def compare(params, config, theirs, image, ids, record_property):
    ours = CLIP(config)
    same_tree(params, lambda: ours.init(jax.random.key(0), jnp.asarray(image), jnp.asarray(ids), train=False)["params"])
    out = ours.apply(as_arrays({"params": params}), jnp.asarray(image), jnp.asarray(ids), train=False)
    with torch.no_grad():
        want = theirs(pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)), input_ids=torch.tensor(ids).long())
    name = type(theirs).__name__
    close(out.image, want.image_embeds, 2e-5, f"{name} images", record_property)
    close(out.text, want.text_embeds, 2e-5, f"{name} texts", record_property)
    logits = out.logit_scale * out.image @ out.text.T + out.logit_bias
    close(logits, want.logits_per_image, 1e-4, f"{name} logits", record_property)


def test_clip(record_property):
    theirs, w = clip_like(siglip=False)
    w["logit_scale"] = np.asarray(w["logit_scale"])
    params = {
        "vision": {
            "patches": {"kernel": w["vision_model.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
            "class_token": w["vision_model.embeddings.class_embedding"],
            "positions": w["vision_model.embeddings.position_embedding.weight"],
            "pre_norm": norm(w, "vision_model.pre_layrnorm"), "norm": norm(w, "vision_model.post_layernorm"),
            "encoder": stacked(w, "vision_model.encoder.layers", CLIP_LAYER)},
        "text": {
            "tokens": {"embedding": w["text_model.embeddings.token_embedding.weight"]},
            "positions": w["text_model.embeddings.position_embedding.weight"],
            "encoder": stacked(w, "text_model.encoder.layers", CLIP_LAYER),
            "norm": norm(w, "text_model.final_layer_norm")},
        "vision_projection": {"kernel": w["visual_projection.weight"].T},
        "text_projection": {"kernel": w["text_projection.weight"].T}, "logit_scale": w["logit_scale"],
    }
    stack = TransformerConfig(width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=MLP, eps=1e-5, activation="quick_gelu")
    config = CLIPConfig(
        vision=ViTConfig(transformer=stack, image_size=20, patch=5, pre_norm=True, patch_bias=False),
        text=TextConfig(transformer=stack, vocab_size=90, context_length=9, pool="eos", eos_id=89), embed_dim=32)
    compare(params, config, theirs, images(), tokens(), record_property)


def test_siglip(record_property):
    theirs, w = clip_like(siglip=True)
    packed, bias = w["vision_model.head.attention.in_proj_weight"], w["vision_model.head.attention.in_proj_bias"]
    heads = (HEADS, WIDTH // HEADS)
    attention = {name: {"kernel": packed[i * WIDTH:(i + 1) * WIDTH].T.reshape(WIDTH, *heads),
                        "bias": bias[i * WIDTH:(i + 1) * WIDTH].reshape(heads)}
                 for i, name in enumerate(("query", "key", "value"))}
    out = dense(w, "vision_model.head.attention.out_proj")
    attention["out"] = out | {"kernel": out["kernel"].reshape(*heads, WIDTH)}
    params = {
        "vision": {
            "patches": {"kernel": w["vision_model.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
                        "bias": w["vision_model.embeddings.patch_embedding.bias"]},
            "positions": w["vision_model.embeddings.position_embedding.weight"],
            "norm": norm(w, "vision_model.post_layernorm"),
            "encoder": stacked(w, "vision_model.encoder.layers", CLIP_LAYER),
            "map_head": {"probe": w["vision_model.head.probe"], "attention": attention,
                         "mlp_norm": norm(w, "vision_model.head.layernorm"),
                         "mlp": {"up": dense(w, "vision_model.head.mlp.fc1"),
                                 "down": dense(w, "vision_model.head.mlp.fc2")}}},
        "text": {
            "tokens": {"embedding": w["text_model.embeddings.token_embedding.weight"]},
            "positions": w["text_model.embeddings.position_embedding.weight"],
            "encoder": stacked(w, "text_model.encoder.layers", CLIP_LAYER),
            "norm": norm(w, "text_model.final_layer_norm")},
        "text_projection": dense(w, "text_model.head"), "logit_scale": w["logit_scale"].reshape(()),
        "logit_bias": w["logit_bias"].reshape(()),
    }
    stack = TransformerConfig(width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=MLP, eps=1e-6, activation="gelu_tanh")
    config = CLIPConfig(
        vision=ViTConfig(transformer=stack, image_size=20, patch=5, pool="map", class_token=False),
        text=TextConfig(transformer=stack, vocab_size=90, context_length=9, causal=False, pool="last"),
        embed_dim=WIDTH, vision_projection=False, text_projection_bias=True, logit_bias=-10.0)
    compare(params, config, theirs, images(), tokens(), record_property)
