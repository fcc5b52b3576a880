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
# # Search your own photos, and classify them without training
#
# CLIP embeds images and texts in one space. An image lies near the texts that describe it. That is enough to
#
# * search photos by words, or by another photo,
# * classify them into any categories that you can name, without training,
# * draw a map of them.
#
# Choose *Runtime > Run all*. Without changes the notebook draws its own images, so that it also runs offline.

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
# Set `PHOTOS` to a folder of yours, for example one of your Google Drive, and `QUERIES` and `LABELS` to your own words.
# `MODEL` is any CLIP or SigLIP of the Hugging Face hub, or a model that you trained.

# %% tags=["parameters"]
PHOTOS = ""  # such as "/content/drive/MyDrive/Photos"; empty: images of coloured shapes are drawn
MODEL = "openai/clip-vit-base-patch32"  # downloaded from the hub (600 MB), or a folder; for drawn images see below
QUERIES = ["a large red heart", "a blue star above a green circle", "two squares"]
LABELS = ["circle", "square", "triangle", "star", "cross", "heart", "diamond"]
COUNT = 300  # images that are drawn if PHOTOS is empty
STEPS = 200  # training steps of the small CLIP for drawn images
SCENES = "scenes:"  # data that it learns from

# %%
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from jaxmm.data.scenes import draw, random_scene

WORK = Path(tempfile.mkdtemp(prefix="jaxmm-"))  # everything that this notebook writes
print("files are written into", WORK)


def show(images, titles, columns=6):
    """Show images in a grid, each under its title."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    axes = plt.figure(figsize=(2.1 * columns, 2.5 * rows), layout="constrained").subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=10)
    plt.show()


# %% [markdown]
# ## The photos

# %%
if PHOTOS:
    paths = sorted(path for path in Path(PHOTOS).expanduser().rglob("*")
                   if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
else:
    (WORK / "photos").mkdir()
    generator, paths = random.Random(7), []
    for number in range(COUNT):
        paths.append(WORK / "photos" / f"{number:03}.png")
        draw(random_scene(generator), 128).save(paths[-1])
print(len(paths), "photos")
show([Image.open(path) for path in paths[:12]], [path.name for path in paths[:12]])

# %% [markdown]
# ## The model
#
# `jaxmm.load` takes the name of a repository of the hub, a folder, or a run. For drawn images, and if the hub cannot be
# reached, a small CLIP is trained here instead, on scenes like these (`configs/clip_scenes.py`). It knows coloured
# shapes and nothing else.

# %%
try:
    model = jaxmm.load(MODEL) if PHOTOS or Path(MODEL).expanduser().exists() else None
except jaxmm.FileError as error:
    print(error)
    model = None
if model is None:
    recipe = jaxmm.load_recipe("clip_scenes")
    data = replace(recipe.data, train=f"{SCENES}train", val=f"{SCENES}val", data_dir=str(WORK / "data"))
    jaxmm.train(replace(recipe, data=data, steps=STEPS, evals=(), eval_every=None), WORK / "clip")
    model = jaxmm.load(WORK / "clip")
print(f"{type(model.config).__name__} with {model.num_parameters:,} parameters")

# %% [markdown]
# ## Search by words
#
# Every photo is embedded once. A query is embedded too, and the photos with the largest cosine come first.

# %%
embeddings = model.encode_image(paths)
print("embeddings:", embeddings.shape)


def search(query, count=6):
    """Return the numbers of the photos nearest to an embedding, and their cosines."""
    cosines = embeddings @ query
    best = np.argsort(-cosines)[:count]
    return best, cosines[best]


for query in QUERIES:
    best, cosines = search(model.encode_text(query)[0])
    print(f"“{query}”")
    show([Image.open(paths[i]) for i in best], [f"cosine {cosine:.2f}" for cosine in cosines])

# %% [markdown]
# ## Search by a photo
#
# The first photo is the query. The others are those that look most like it.

# %%
best, cosines = search(embeddings[0])
show([Image.open(paths[i]) for i in best], ["query"] + [f"cosine {cosine:.2f}" for cosine in cosines[1:]])

# %% [markdown]
# ## Classify without training
#
# Each label is put into a sentence. The label whose sentence is nearest to the photo wins. The probabilities are a
# softmax over the labels, so they compare these labels only.

# %%
TEMPLATE = "a photo of a {}." if PHOTOS else "a large {}"
answers = model.classify(paths, LABELS, templates=[TEMPLATE], top=len(LABELS))
shown = list(range(0, len(paths), max(1, len(paths) // 12)))[:12]
show([Image.open(paths[i]) for i in shown],
     ["\n".join(f"{label} {probability:.0%}" for label, probability in answers[i][:2]) for i in shown])

# %% [markdown]
# How often does each label win?

# %%
wins = [sum(answer[0][0] == label for answer in answers) for label in LABELS]
figure, axis = plt.subplots(figsize=(7, 3))
axis.barh(LABELS[::-1], wins[::-1], color="tab:blue")
axis.set_xlabel("photos")
axis.set_title("Most likely label")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## A map of the photos
#
# The two directions in which the embeddings differ most (principal components). Photos of the same label form groups.

# %%
centred = embeddings - embeddings.mean(axis=0)
plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
figure, axis = plt.subplots(figsize=(8, 6))
for label in LABELS:
    own = np.array([answer[0][0] == label for answer in answers])
    axis.scatter(*plane[own].T, s=22, label=label)
axis.set_xlabel("first principal component")
axis.set_ylabel("second principal component")
axis.legend(title="most likely label", bbox_to_anchor=(1.02, 1), loc="upper left")
axis.set_title("Every point is a photo")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Next
#
# * For large folders, `jaxmm search index FOLDER INDEX` keeps the embeddings on disk, and
#   `jaxmm search query INDEX "a red bicycle"` searches them.
# * `jaxmm eval MODEL --on folder:DIR` measures a model on labelled images.
# * The next notebook fine-tunes a model on your own classes.
