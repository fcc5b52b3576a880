# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Eight devices: meshes, sharding, and a plan for a pod
#
# Large models are trained on many chips. You need none to learn how: JAX can pretend that this machine has eight
# devices. They are slow, but they compute, shard and communicate like eight chips.

# %%
import importlib.util
import subprocess
import sys

JAXMM = "jaxmm[train,tpu]"  # or the address of a checkout: "jaxmm[train,tpu] @ git+https://..."
if importlib.util.find_spec("jaxmm") is None:  # as on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", JAXMM], check=True)

import jax

import jaxmm

jax.config.update("jax_platforms", "cpu")  # also where there is a GPU or a TPU
jax.config.update("jax_num_cpu_devices", 8)
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}, all of them this machine")

# %% [markdown]
# ## Settings

# %% tags=["parameters"]
STEPS = 15  # of each training run
RECIPE, TOPOLOGY = "clip_b16", "v5e:4x4"  # what is planned, and for which chips
BATCH = 64  # images per chip and step of the plan
LARGE = "clip_l14"  # recipe whose memory is shown

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from jaxmm import MeshConfig
from jaxmm.sharding import make_mesh, named_leaves, shardings

WORK = Path(tempfile.mkdtemp(prefix="jaxmm-"))  # everything that this notebook writes
print("files are written into", WORK)

# %% [markdown]
# ## Three ways to divide the work
#
# A mesh arranges the devices along three axes:
#
# * `data`: every device has a copy of the model and its own part of the batch.
# * `fsdp`: the batch is divided as well, and each device keeps only a part of every parameter.
# * `tensor`: devices share the attention heads and the hidden units of the same images.
#
# They can be combined, as long as their product is the number of devices.

# %%
MESHES = {"data 8": MeshConfig(data=8), "fsdp 8": MeshConfig(data=1, fsdp=8),
          "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2)}
for name, config in MESHES.items():
    mesh = make_mesh(config)
    print(f"{name}: axes {dict(mesh.shape)}, devices {[device.id for device in mesh.devices.flat]}")

# %% [markdown]
# ## Which device has which part of a parameter?
#
# One table, `jaxmm/sharding.py`, says how parameters are divided, by their names; models never mention a mesh. The
# drawing shows the first matrix of an MLP in one layer (the first axis of the parameter, which is never divided, counts
# the layers). A number is a device; several in one block each have a copy of it.

# %%
recipe = jaxmm.load_recipe("vit_digits")
task = recipe.task.bind(image_size=8, classes=10, tokenizer=None)
shapes = jax.eval_shape(task.init, jax.random.key(0))
path = "encoder/blocks/mlp/up/kernel"
colors = plt.get_cmap("tab10").colors


def blocks(mesh):
    """Return the rows and columns of every block of the parameter, with the devices that have it."""
    leaf, sharding = dict(named_leaves(shapes))[path], dict(named_leaves(shardings(shapes, mesh)))[path]
    parts = {}
    for device, index in sharding.devices_indices_map(leaf.shape).items():
        parts.setdefault(tuple(part.indices(size)[:2] for part, size in zip(index[-2:], leaf.shape[-2:], strict=True)),
                         []).append(device.id)
    return leaf.shape[-2:], parts, sharding.spec


figure, axes = plt.subplots(1, len(MESHES), figsize=(13, 3.6))
for axis, (name, config) in zip(axes, MESHES.items(), strict=True):
    (height, width), parts, spec = blocks(make_mesh(config))
    for number, (((top, bottom), (left, right)), devices) in enumerate(parts.items()):
        axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, facecolor=colors[number % 10],
                                     edgecolor="white", alpha=0.6))
        axis.text((left + right) / 2, (top + bottom) / 2, ", ".join(map(str, devices)), ha="center", va="center")
    axis.set(xlim=(0, width), ylim=(height, 0), xlabel="hidden units", ylabel="width", title=f"{name}\n{spec}")
figure.suptitle(path)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The same training on every mesh
#
# A contrastive loss compares every image with every text of the batch, also with those of other devices. In jaxmm the
# loss of eight devices is the loss of one: you choose a mesh for speed and memory, not for the result.

# %%
recipe = jaxmm.load_recipe("clip_scenes")
small = replace(recipe.task.model.vision.transformer, width=32, depth=1, mlp_dim=64, remat="none", scan=False)
towers = replace(recipe.task.model, vision=replace(recipe.task.model.vision, transformer=small),
                 text=replace(recipe.task.model.text, transformer=small), embed_dim=32)
data = replace(recipe.data, train="scenes:tiny/train", val=None, batch_size=32, data_dir=str(WORK / "data"))
losses = {}
for name, config in {"one device": MeshConfig(data=1), "data 2, fsdp 2, tensor 2": MESHES["data 2, fsdp 2, tensor 2"]
                     }.items():
    workdir = WORK / name.replace(" ", "").replace(",", "-")
    jaxmm.train(replace(recipe, task=replace(recipe.task, model=towers), data=data, steps=STEPS, mesh=config, evals=(),
                        eval_every=None, log_every=1), workdir)
    losses[name] = [json.loads(line)["train/loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
difference = np.abs(np.subtract(*losses.values())).max()
print(f"largest difference of the losses: {difference:.1e}")

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4))
for (name, values), style in zip(losses.items(), ("-", "o"), strict=True):
    axis.plot(range(1, len(values) + 1), values, style, label=name)
axis.set_xlabel("step")
axis.set_ylabel("training loss")
axis.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What one device keeps
#
# Parameters and AdamW's two moments of a large CLIP, in float32. Nothing is allocated: shapes and shardings suffice.

# %%
task = jaxmm.load_recipe(LARGE).task
shapes = jax.eval_shape(task.init, jax.random.key(0))
sizes = {}
for name, config in MESHES.items():
    places = dict(named_leaves(shardings(shapes, make_mesh(config))))
    sizes[name] = sum(np.prod(places[path].shard_shape(leaf.shape)) for path, leaf in named_leaves(shapes)) * 4 / 2**30
figure, axis = plt.subplots(figsize=(7.5, 2.8))
for kind, (start, share) in {"parameters": (0, 1), "moments": (1, 2)}.items():
    axis.barh(list(sizes), [share * size for size in sizes.values()], left=[start * size for size in sizes.values()],
              label=kind)
for row, size in enumerate(sizes.values()):
    axis.text(3 * size, row, f" {3 * size:.2f} GiB", va="center")
axis.set_xlim(right=3.6 * max(sizes.values()))
axis.set_xlabel("GiB on each device")
axis.set_title(LARGE)
axis.invert_yaxis()
axis.legend(loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Plan before you pay
#
# XLA's TPU compiler runs without a TPU. A plan compiles the train step of a recipe for a slice that you do not have,
# and reports whether it fits, and the compiler's estimate of the time of a step. No chip has run that estimate.

# %%
from jaxmm.planning.chips import open_topology
from jaxmm.planning.plan import make_plan

topology, recipe = open_topology(TOPOLOGY), jaxmm.load_recipe(RECIPE)
chips = len(topology.devices)
recipe = replace(recipe, data=replace(recipe.data, batch_size=BATCH * chips))
plans = {}
for name, mesh in {f"data {chips}": MeshConfig(), f"fsdp {chips}": MeshConfig(data=1, fsdp=chips)}.items():
    plan = plans[name] = make_plan(replace(recipe, mesh=mesh), topology)
    seconds = plan.estimated_step_seconds
    print(f"{name}: {'fits' if plan.fits else 'does not fit'}, {plan.peak_bytes / 2**30:.2f} of "
          f"{plan.hbm_bytes / 2**30:.2f} GiB per chip"
          + (f", {seconds * 1e3:,.0f} ms and {plan.batch_size / seconds:,.0f} images/s" if seconds else ""))

# %%
figure, axis = plt.subplots(figsize=(7.5, 2.8))
for row, plan in enumerate(plans.values()):
    left = 0
    for part, color in (("argument_bytes", "tab:blue"), ("temporary_bytes", "tab:orange")):
        size = (getattr(plan, part) or 0) / 2**30
        axis.barh(row, size, left=left, color=color)
        left += size
    axis.text(left, row, f" {plan.peak_bytes / 2**30:.2f} GiB in all", va="center")
axis.axvline(plan.hbm_bytes / 2**30, color="black", linestyle="--")
axis.set_yticks(range(len(plans)), plans)
axis.invert_yaxis()
axis.set_xlabel("GiB on each chip; the line is what a chip has")
axis.set_title(f"{RECIPE} on {TOPOLOGY}, {plan.batch_size:,} images per step")
axis.legend(handles=[Patch(color="tab:blue", label="state and batch"), Patch(color="tab:orange", label="temporary")],
            loc="lower right")
figure.tight_layout()
plt.show()

# %% [markdown]
# The same on the command line, with suggestions if a recipe does not fit:
#
# ```
# jaxmm plan --config clip_b16 --topology v5e:4x4
# jaxmm plan --config clip_l14 --topology v5e:16x16 --search
# ```
