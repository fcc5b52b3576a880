# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train BLIP from scratch, and look at what it learns
#
# BLIP is one model with three skills: it embeds images and texts in one space, it judges whether an image and a text
# belong together, and it writes captions. This notebook trains a small one on generated images of coloured shapes, in
# minutes. Then it writes captions, shows where the model looks at each word, and re-ranks search results.

# %%
import importlib.util
import subprocess
import sys

JAXMM = "jaxmm[train]"  # or the address of a checkout: "jaxmm[train] @ git+https://..."
if importlib.util.find_spec("jaxmm") is None:  # as on Colab
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", JAXMM], check=True)

import jax

import jaxmm

print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Settings
#
# 1,000 steps take about seven minutes on two CPU cores, and much less on a GPU or a TPU. With half as many the captions
# are good already, but the matching head, which learns last, is not yet.

# %% tags=["parameters"]
STEPS = 1000
EVALUATIONS = 4  # during training
SCENES = "scenes:"  # 8,000 images for training and 500 held-out ones, drawn at first use
POOL = 100  # images that a query is searched among
CAPTIONED = 64  # held-out images that are captioned

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from jaxmm.data.images import decode

WORK = Path(tempfile.mkdtemp(prefix="jaxmm-"))  # everything that this notebook writes
print("files are written into", WORK)


def show(images, titles, columns=4):
    """Show images in a grid, each under its title."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    axes = plt.figure(figsize=(3 * columns, 3.6 * rows), layout="constrained").subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=9)
    plt.show()


# %% [markdown]
# ## The data
#
# Every image shows one to three shapes and has five captions, some long, some short.

# %%
train, held_out = (jaxmm.open_source(f"{SCENES}{split}", data_dir=str(WORK / "data")) for split in ("train", "val"))
print(f"{len(train):,} images for training, {len(held_out):,} held out")
show([decode(train[i]["image"]) for i in range(8)], [fill(train[i]["texts"][0], 28) for i in range(8)])
print(*train[0]["texts"], sep="\n")

# %% [markdown]
# ## Training
#
# The recipe is `configs/blip_scenes.py`: a vision transformer of 4 layers, a text transformer of 2, and BLIP's three
# losses with a momentum encoder, a queue and hard negatives. A recipe is a dataclass; `replace` changes its fields.

# %%
recipe = jaxmm.load_recipe("blip_scenes")
data = replace(recipe.data, train=f"{SCENES}train", val=f"{SCENES}val", data_dir=str(WORK / "data"))
evals = jaxmm.Retrieval(pool=POOL, captions="first"), jaxmm.Reranking(pool=POOL, captions="first")
metrics = jaxmm.train(replace(recipe, data=data, steps=STEPS, evals=evals, log_every=max(1, STEPS // 50),
                              eval_every=max(1, STEPS // EVALUATIONS)), WORK / "blip")
model = jaxmm.load(WORK / "blip")
print(f"{model.num_parameters:,} parameters")


# %%
def curve(name):
    """Return the steps and values of a metric in the run's metrics.jsonl."""
    rows = map(json.loads, (WORK / "blip" / "metrics.jsonl").read_text().splitlines())
    return zip(*((row["step"], row[name]) for row in rows if row.get(name) is not None), strict=True)


figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
for name, label in (("contrastive", "contrastive (ITC)"), ("matching", "matching (ITM)"), ("writing", "captions (LM)")):
    axes[0].plot(*curve(f"train/{name}"), label=label)
axes[0].set_title("training losses")
axes[0].set_ylim(bottom=0)
for name, label in (("val/t2i_recall@1", "by cosine"), ("val/t2i_itm_recall@1", "re-ranked by the matching head")):
    axes[1].plot(*curve(name), marker="o", label=label)
axes[1].set_title(f"recall@1 of {POOL} held-out images by their texts")
axes[1].set_ylim(0, 1.02)
for axis in axes:
    axis.set_xlabel("step")
    axis.legend(fontsize=9)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Captions of held-out images
#
# Beam search writes the likeliest caption. The scenes are known, so every caption can be checked: does it name the
# largest shape and its colour, is it true in every detail?

# %%
images = [decode(held_out[i]["image"]) for i in range(CAPTIONED)]
captions = [best[0][0] for best in model.caption(images, decoding=jaxmm.Decoding(beams=3, max_length=32))]
largest = np.mean([held_out.names_largest(i, caption) for i, caption in enumerate(captions)])
true = np.mean([held_out.is_true(i, caption) for i, caption in enumerate(captions)])
print(f"{largest:.0%} of {CAPTIONED} captions name the largest shape and its colour, {true:.0%} are true in full")
show(images[:8], [f"{fill(caption, 28)}\n({'true' if held_out.is_true(i, caption) else 'not quite'})"
                  for i, caption in enumerate(captions[:8])])

# %% [markdown]
# Nucleus sampling writes a different caption each time. The number is the mean log-probability of its tokens.

# %%
sampled = jaxmm.Decoding(sample=True, top_p=0.9, max_length=32)
for caption, score in model.caption(images[:1], decoding=sampled, top=4, seed=1)[0]:
    print(f"{score:6.2f}  {caption}")

# %% [markdown]
# ## Where does it look?
#
# The decoder reads the image by cross-attention. `attention_maps` returns, for every word of a caption, how much each
# patch of the image counted when the word was written: the mean over layers and heads.

# %%
for i in range(3):
    [words] = model.attention_maps(images[i], captions[i])
    figure, axes = plt.subplots(1, len(words) + 1, figsize=(1.35 * (len(words) + 1), 1.8))
    axes[0].imshow(images[i])
    axes[0].set_title("image", fontsize=9)
    for axis, (word, weights) in zip(axes[1:], words, strict=True):
        light = np.asarray(Image.fromarray((weights / weights.max() * 255).astype(np.uint8)).resize(images[i].size))
        axis.imshow((np.asarray(images[i]) * (0.15 + 0.85 * light[..., None] / 255)).astype(np.uint8))
        axis.set_title(word, fontsize=9)
    for axis in axes:
        axis.axis("off")
    figure.tight_layout(w_pad=0.3)
    plt.show()

# %% [markdown]
# ## Re-rank search results
#
# Cosines of embeddings are fast, but an embedding forgets details such as left and right. The matching head reads image
# and text together. It is slower, so it only re-orders the nearest images.

# %%
count = min(POOL, len(held_out))
pool = [decode(held_out[i]["image"]) for i in range(count)]
texts = [held_out[i]["texts"][0] for i in range(count)]
cosines = model.encode_text(texts) @ model.encode_image(pool).T
nearest = np.argsort(-cosines, axis=1)[:, :8]
wrong = [i for i in range(count) if nearest[i, 0] != i and i in nearest[i]]
print(f"{len(wrong)} of {count} texts have their image among the nearest eight, but not in the first place")
for i in wrong[:2] or [0]:
    chances = model.match([pool[k] for k in nearest[i]], texts[i])[:, 0]
    order = np.argsort(-chances)
    print(f"“{texts[i]}”")
    for title, ranked, score in (("by cosine", nearest[i], cosines[i, nearest[i]]),
                                 ("re-ranked", nearest[i][order], chances[order])):
        figure, axes = plt.subplots(1, 8, figsize=(13, 2.2))
        for axis, k, value in zip(axes, ranked, score, strict=True):
            axis.imshow(pool[k])
            axis.set_title(f"{value:.2f}", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set(visible=k == i, color="tab:green", linewidth=4)
        axes[0].set_ylabel(title, fontsize=11)
        figure.tight_layout()
        plt.show()

# %% [markdown]
# The image that belongs to the text has a green frame. Over all held-out images:

# %%
figure, axis = plt.subplots(figsize=(6, 3.2))
names, places = ("i2t", "t2i"), np.arange(2)
for shift, kind, label in ((-0.2, "recall@1", "by cosine"), (0.2, "itm_recall@1", "re-ranked")):
    bars = axis.bar(places + shift, [metrics[f"val/{name}_{kind}"] for name in names], 0.38, label=label)
    axis.bar_label(bars, fmt="%.2f")
axis.set_xticks(places, ["image to text", "text to image"])
axis.set_ylabel(f"recall@1 among {POOL}")
axis.set_ylim(0, 1.15)
axis.legend(loc="upper center", ncols=2)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Next
#
# * The run's folder has a report, `report.html`, and checkpoints: `jaxmm.train` with the same folder and more steps
#   continues.
# * For your own captions start from `configs/blip_captions.py`, for questions and answers from `configs/blip_vqa.py`.
# * The next notebook uses such a model to clean the captions of a crawl.
