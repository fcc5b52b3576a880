"""The two sides of `benchmarks.train_step`, one process each: `python -m benchmarks.train_step_sides SIDE CASE ...`.

Both draw the same random images, texts and labels; the weights are transformers', drawn once and read by all.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import seconds, serve

RATE, DECAY = 1e-4, 1e-2


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    model: str
    """`vit:SIZE/PATCH` or `clip:NAME`, by jaxmm's names."""
    train: bool
    batch: int
    dtype: str
    remat: str
    """Our remat policy."""
    scan: bool = True
    """True if our layers are one compiled layer in a loop."""

    @property
    def sizes(self) -> dict:
        """Width, depth, heads and MLP of both towers, patch and grid."""
        from jaxmm.models.clip import CLIP_SIZES
        from jaxmm.models.vit import SIZES
        kind, name = self.model.split(":")
        if kind == "vit":
            vision, patch = name.split("/")
            text, embed = None, None
        else:
            tower, _, width, heads, depth, embed = CLIP_SIZES[name]
            vision, patch = tower.split("/")
            text = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
                    "intermediate_size": 4 * width}
        width, depth, mlp, heads = SIZES[vision]
        vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
                  "intermediate_size": mlp, "patch_size": int(patch), "image_size": 224}
        return {"vision": vision, "text": text, "embed": embed}

    @property
    def flop(self) -> float:
        """FLOPs of the matrix products in one run: 2 per multiplication and addition, three times that in training."""
        def tower(size, tokens):
            d, mlp = size["hidden_size"], size["intermediate_size"]
            return size["num_hidden_layers"] * tokens * (2 * (4 * d * d + 2 * d * mlp) + 4 * tokens * d)
        sizes = self.sizes
        vision, text = sizes["vision"], sizes["text"]
        patch, d = vision["patch_size"], vision["hidden_size"]
        patches = (224 // patch) ** 2
        total = tower(vision, patches + 1) + 2 * patches * 3 * patch * patch * d
        total += tower(text, 77) if text else 2 * d * 1000
        return self.batch * total * (3 if self.train else 1)

    def inputs(self) -> dict[str, np.ndarray]:
        """Draw images, labels, and texts that end with CLIP's end token."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 49_000, (self.batch, 77), np.int32)
        tokens[:, -1] = 49_407
        return {"image": rng.integers(0, 256, (self.batch, 224, 224, 3), np.uint8),
                "label": rng.integers(0, 1000, self.batch, np.int32), "tokens": tokens}


def theirs(case: Case, weights: Path, gpu: bool):
    """Return (run, product) of transformers' model with, in training, torch's AdamW."""
    import torch
    import transformers

    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    sizes = case.sizes
    if sizes["text"] is None:
        config = transformers.ViTConfig(**sizes["vision"], num_labels=1000, layer_norm_eps=1e-6)
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.CLIPConfig(text_config=sizes["text"] | {"projection_dim": sizes["embed"]},
                                         vision_config=sizes["vision"] | {"projection_dim": sizes["embed"]},
                                         projection_dim=sizes["embed"])
        model = transformers.CLIPModel(config)
    if weights.exists():
        model.load_state_dict({k: torch.from_numpy(v) for k, v in np.load(weights).items()})
    else:
        np.savez(weights, **{k: v.numpy() for k, v in model.state_dict().items()})
    model = model.to(device).train(case.train)
    inputs = case.inputs()
    image = torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2).float()
    image = ((image / 255 - 0.5) / 0.5).contiguous().to(device)
    if sizes["text"] is None:
        arguments = {"pixel_values": image}
        label = torch.from_numpy(inputs["label"]).long().to(device)
    else:
        arguments = {"pixel_values": image, "input_ids": torch.from_numpy(inputs["tokens"]).long().to(device),
                     "return_loss": True}
    forward = torch.compile(model) if gpu else model
    half = torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True if gpu else None)

    def wait(value):
        return value.float().cpu().numpy()

    def run():
        if not case.train:
            with torch.inference_mode(), half:
                return wait(forward(**arguments).logits)
        optimizer.zero_grad(set_to_none=True)
        with half:
            out = forward(**arguments)
            loss = out.loss if sizes["text"] else torch.nn.functional.cross_entropy(out.logits.float(), label)
        loss.backward()
        optimizer.step()
        return wait(loss.detach())

    def product(n):
        a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, case.dtype)) for _ in range(2))
        return lambda: wait((a @ b)[0, 0])

    return run, product


def ours(case: Case, weights: Path, gpu: bool):
    """Return (run, product) of jaxmm's prediction or train step."""
    import jax
    import jax.numpy as jnp

    from jaxmm.compiling import jit_options
    from jaxmm.config import MeshConfig, OptimizerConfig
    from jaxmm.models.clip import clip
    from jaxmm.models.vit import vit
    from jaxmm.nn.pixels import Pixels
    from jaxmm.sharding import make_mesh, place_batch
    from jaxmm.tasks.contrastive_learning import ContrastiveLearning
    from jaxmm.tasks.image_classification import Classification
    from jaxmm.training.optimizer import make_optimizer
    from jaxmm.training.runtime import keep_memory
    from jaxmm.training.state import init_state
    from jaxmm.training.step import compile_step

    keep_memory()  # as run_train.py does
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    platform = jax.devices()[0].platform
    kind, name = case.model.split(":")
    stack = {"dtype": case.dtype, "remat": case.remat, "scan": case.scan}
    if kind == "vit":
        task = Classification(model=vit(name, classes=1000, stack=stack), pixels=Pixels())
    else:
        task = ContrastiveLearning(model=clip(name, activation="quick_gelu", stack=stack), pixels=Pixels())
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.asarray, from_transformers(dict(np.load(weights)), kind, case.sizes))
        names = {"image", "label"} if kind == "vit" else {"image", "tokens"}
        batch = place_batch({k: v for k, v in case.inputs().items() if k in names}, mesh)
        if case.train:
            config = OptimizerConfig(learning_rate=RATE, schedule="constant", warmup=0, weight_decay=DECAY, decay=".",
                                     clip=None)
            optimizer = make_optimizer(config, params, 1000)
            state = jax.jit(lambda rng: init_state(task, optimizer, rng))(jax.random.key(0))
            expected, given = (jax.tree.map(jnp.shape, tree) for tree in (state.params, params))
            if expected != given:
                raise ValueError(f"transformers' weights have shapes {given}; expected {expected}")
            state = state.replace(params=params)
            step = compile_step(task, optimizer, mesh, state).lower(state, batch, jax.random.key(0)).compile()
        else:
            predict = jax.jit(task.classifier.logits, compiler_options=jit_options(platform))

    def run():
        nonlocal state
        if not case.train:
            return np.asarray(predict(params, batch))
        state, metrics = step(state, batch, jax.random.key(0))
        jax.block_until_ready(state)
        return np.asarray(metrics["loss"])

    def product(n):
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (n, n), case.dtype) for key in keys)
        multiply = jax.jit(jnp.matmul, compiler_options=jit_options(platform))
        return lambda: multiply(a, b).block_until_ready()

    if not case.train:
        state = None
    return run, product


def from_transformers(weights: dict[str, np.ndarray], kind: str, sizes: dict) -> dict:
    """Convert a state dict to jaxmm's parameters, from `ViTForImageClassification` or `CLIPModel`."""
    def dense(key):
        return {"kernel": weights[f"{key}.weight"].T} | (
            {"bias": weights[f"{key}.bias"]} if f"{key}.bias" in weights else {})

    def norm(key):
        return {"scale": weights[f"{key}.weight"], "bias": weights[f"{key}.bias"]}

    def stack(prefix, size, names):
        d, heads = size["hidden_size"], size["num_attention_heads"]

        def layer(i):
            linear = {ours: dense(f"{prefix}.{i}.{key}") for ours, key in names.items() if "norm" not in ours}
            for name in ("query", "key", "value"):
                part = linear[name]
                linear[name] = {"kernel": part["kernel"].reshape(d, heads, -1), "bias": part["bias"].reshape(heads, -1)}
            linear["out"]["kernel"] = linear["out"]["kernel"].reshape(heads, -1, d)
            return {"attention": {k: linear[k] for k in ("query", "key", "value", "out")},
                    "mlp": {k: linear[k] for k in ("up", "down")},
                    **{k: norm(f"{prefix}.{i}.{names[k]}") for k in ("attention_norm", "mlp_norm")}}

        layers = [layer(i) for i in range(size["num_hidden_layers"])]
        return {"blocks": stacked(layers)}

    def stacked(trees):
        if isinstance(trees[0], dict):
            return {k: stacked([tree[k] for tree in trees]) for k in trees[0]}
        return np.stack(trees)

    def patches(key):
        bias = {"bias": weights[f"{key}.bias"]} if f"{key}.bias" in weights else {}
        return {"kernel": weights[f"{key}.weight"].transpose(2, 3, 1, 0)} | bias

    if kind == "vit":
        if "vit.layers.0.layernorm_before.weight" in weights:
            prefix, attention, mlp = "vit.layers", "attention.{0}_proj", ("mlp.fc1", "mlp.fc2")
            out = "attention.o_proj"
        else:
            prefix, attention, mlp = "vit.encoder.layer", "attention.attention.{1}", (
                "intermediate.dense", "output.dense")
            out = "attention.output.dense"
        names = {"attention_norm": "layernorm_before", "mlp_norm": "layernorm_after", "out": out, "up": mlp[0],
                 "down": mlp[1]} | {name: attention.format(name[0], name) for name in ("query", "key", "value")}
        at = "vit.embeddings"
        return {"patches": patches(f"{at}.patch_embeddings.projection"),
                "positions": weights[f"{at}.position_embeddings"][0], "class_token": weights[f"{at}.cls_token"][0, 0],
                "encoder": stack(prefix, sizes["vision"], names), "norm": norm("vit.layernorm"),
                "head": dense("classifier")}
    names = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2", "out": "self_attn.out_proj", "up": "mlp.fc1",
             "down": "mlp.fc2"} | {name: f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")}
    at = "vision_model.embeddings"
    vision = {"patches": patches(f"{at}.patch_embedding"), "positions": weights[f"{at}.position_embedding.weight"],
              "class_token": weights[f"{at}.class_embedding"], "pre_norm": norm("vision_model.pre_layrnorm"),
              "encoder": stack("vision_model.encoder.layers", sizes["vision"], names),
              "norm": norm("vision_model.post_layernorm")}
    at = "text_model.embeddings"
    text = {"tokens": {"embedding": weights[f"{at}.token_embedding.weight"]},
            "positions": weights[f"{at}.position_embedding.weight"],
            "encoder": stack("text_model.encoder.layers", sizes["text"], names),
            "norm": norm("text_model.final_layer_norm")}
    return {"vision": vision, "text": text, "vision_projection": dense("visual_projection"),
            "text_projection": dense("text_projection"), "logit_scale": weights["logit_scale"]}


def main():
    """Serve one side of one case (see `measure.serve`)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "theirs"])
    parser.add_argument("case", help="a Case as JSON")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    case = Case(**json.loads(args.case))
    run, product = {"ours": ours, "theirs": theirs}[args.side](case, args.weights, args.gpu)
    big, small = (partial(product, 8192 if args.gpu else 3072), partial(product, 8192 if args.gpu else 1536))
    check = np.concatenate([run().ravel()[:1000] for _ in range(2)])
    pace = small()

    def peak():
        multiply, n = big(), 8192 if args.gpu else 3072
        multiply()
        return {"flop_per_s": 2 * n**3 / min(seconds(multiply) for _ in range(7))}

    serve({"check": check.tolist()}, {
        "run": lambda: {"s": seconds(run)}, "peak": peak,
        "pace": lambda: {"s": min(seconds(pace) for _ in range(3))}})


def command(side: str, case: Case, weights: Path, gpu: bool) -> list[str]:
    """Return the command that serves one side of a case."""
    return [sys.executable, "-m", "benchmarks.train_step_sides", side, json.dumps(asdict(case)), str(weights),
            *(["--gpu"] if gpu else [])]


if __name__ == "__main__":
    main()
