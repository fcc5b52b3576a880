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
# # Fine-tune a classifier and a CLIP on a folder of images
#
# You have a few images of each class, in one folder per class. A trained model has learned most of what is needed, so
# that a few minutes of fine-tuning suffice. This notebook
#
# 1. fine-tunes a classifier from the image tower of a CLIP,
# 2. compares it with the same architecture trained from scratch,
# 3. fine-tunes the CLIP itself, so that it still takes any text.
#
# Without changes it draws its own data set, sketches of shapes, so that it also runs offline.

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
# `FOLDER` has two folders, `train` and `test`. Each has one folder per class, named after the class.

# %% tags=["parameters"]
FOLDER = ""  # such as "/content/drive/MyDrive/animals"; empty: sketches of shapes are drawn
START = "openai/clip-vit-base-patch32"  # model to start from, of the hub, or a folder; for drawn images see below
STEPS = 100  # steps of each fine-tuning
BATCH = 64
IMAGES = 20, 30  # sketches of each class for training and for the test
PRETRAIN_STEPS = 200  # steps of the small CLIP that drawn images start from
SCENES = "scenes:"  # data that it learns from

# %%
import json
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from jaxmm.data.scenes import SHAPES

WORK = Path(tempfile.mkdtemp(prefix="jaxmm-"))  # everything that this notebook writes
print("files are written into", WORK)


def show(images, titles, columns=7):
    """Show images in a grid, each under its title."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    axes = plt.figure(figsize=(1.9 * columns, 2.2 * rows), layout="constrained").subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image)
        axis.set_title(title, fontsize=10)
    plt.show()


# %% [markdown]
# ## The images
#
# The sketches are outlines in pencil, turned at random, on grey paper. The model to start from has never met any:
# it knows filled shapes in bright colours, upright.

# %%
def sketch(shape, generator, side=64, scale=4):
    """Draw the outline of a shape, turned and moved at random."""
    image = Image.new("L", (side * scale, side * scale), generator.randrange(190, 240))
    turn, size = generator.uniform(-0.5, 0.5), generator.uniform(0.2, 0.4)
    left, top = (generator.uniform(0.45, 0.55) for _ in "xy")
    points = [((left + size * (x * math.cos(turn) - y * math.sin(turn))) * side * scale,
               (top + size * (x * math.sin(turn) + y * math.cos(turn))) * side * scale) for x, y in SHAPES[shape]]
    ImageDraw.Draw(image).line([*points, *points[:2]], fill=generator.randrange(40, 110), width=2 * scale)
    for _ in range(60):  # specks of dust
        x, y = (generator.randrange(side * scale) for _ in "xy")
        ImageDraw.Draw(image).ellipse([x, y, x + scale, y + scale], fill=generator.randrange(120, 200))
    return image.filter(ImageFilter.GaussianBlur(scale / 2)).resize((side, side)).convert("RGB")


folder = Path(FOLDER).expanduser() if FOLDER else WORK / "sketches"
if not FOLDER:
    generator = random.Random(1)
    for split, count in zip(("train", "test"), IMAGES, strict=True):
        for shape in SHAPES:
            (folder / split / shape).mkdir(parents=True)
            for number in range(count):
                sketch(shape, generator).save(folder / split / shape / f"{number:03}.png")

train, test = jaxmm.open_source(f"folder:{folder / 'train'}"), jaxmm.open_source(f"folder:{folder / 'test'}")
print(f"{len(train)} images for training, {len(test)} for the test, {len(train.classes)} classes:",
      ", ".join(train.classes))
first = [next(i for i in range(len(train)) if train[i]["label"] == label) for label in range(len(train.classes))]
show([Image.open(folder / "train" / train.key(i)) for i in first], train.classes)

# %% [markdown]
# ## The model to start from
#
# A CLIP of the hub. For drawn images, and if the hub cannot be reached, a small one is trained here instead, on scenes
# of filled shapes (`configs/clip_scenes.py`).

# %%
start = START
try:
    model = jaxmm.load(START) if FOLDER or Path(START).expanduser().exists() else None
except jaxmm.FileError as error:
    print(error)
    model = None
if model is None:
    recipe = jaxmm.load_recipe("clip_scenes")
    data = replace(recipe.data, train=f"{SCENES}train", val=f"{SCENES}val", data_dir=str(WORK / "data"))
    jaxmm.train(replace(recipe, data=data, steps=PRETRAIN_STEPS, evals=(), eval_every=None), WORK / "clip")
    start = str(WORK / "clip")
    model = jaxmm.load(start)
side = model.preprocessing.size
print(f"{type(model.config).__name__} with {model.num_parameters:,} parameters for images of {side} x {side} pixels")

# %% [markdown]
# Without any training it classifies the test images like this. Chance is one in the number of classes.

# %%
TEMPLATES = ["a photo of a {}."] if FOLDER else ["a large {}"]
[before] = jaxmm.evaluate(model, test, evaluators=["zero_shot"], templates=TEMPLATES)
print(f"accuracy without training: {before.metrics['zero_shot_top1']:.0%} (chance: {1 / len(test.classes):.0%})")

# %% [markdown]
# ## Fine-tune a classifier
#
# `configs/finetune_folder.py` is a recipe for this. A recipe is a dataclass, and `replace` changes its fields. The
# image tower starts from the trained one, the head is new and starts at zero.

# %%
recipe = jaxmm.load_recipe("finetune_folder")
image = jaxmm.ImageConfig(size=side, train_crop="pad", flip=bool(FOLDER), eval_crop="squash")
data = replace(recipe.data, train=f"folder:{folder / 'train'}", val=f"folder:{folder / 'test'}", batch_size=BATCH,
               image=image)
optimizer = recipe.optimizer if FOLDER else replace(recipe.optimizer, learning_rate=1e-3)
every = max(1, STEPS // 5)
classifier = replace(recipe, data=data, init=jaxmm.InitConfig(source=start), steps=STEPS, optimizer=optimizer,
                     eval_every=every, log_every=every)
tuned = jaxmm.train(classifier, WORK / "classifier")
print(f"accuracy after fine-tuning: {tuned['val/top1']:.0%}")

# %% [markdown]
# The same architecture, the same images, the same number of steps, but random parameters at the start:

# %%
task = replace(recipe.task, model=replace(model.config.vision, classes=None))
scratch = replace(classifier, task=task, init=jaxmm.InitConfig())
untrained = jaxmm.train(scratch, WORK / "scratch")
print(f"accuracy from scratch: {untrained['val/top1']:.0%}")


# %%
def curve(workdir, name):
    """Return the steps and values of a metric in a run's metrics.jsonl."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return zip(*((row["step"], row[name]) for row in rows if name in row), strict=True)


figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for axis, name, title in ((axes[0], "train/loss", "training loss"), (axes[1], "val/top1", "accuracy on test images")):
    for label, workdir in (("fine-tuned", WORK / "classifier"), ("from scratch", WORK / "scratch")):
        axis.plot(*curve(workdir, name), marker="o", label=label)
    axis.set_xlabel("step")
    axis.set_title(title)
axes[1].axhline(before.metrics["zero_shot_top1"], color="grey", linestyle="--", label="without training")
axes[1].set_ylim(0, 1.02)
axes[1].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Which classes are confused?
#
# `jaxmm.evaluate` returns the accuracy with a 95 % interval, that of every class, and on request every prediction.

# %%
[result] = jaxmm.evaluate(WORK / "classifier", test, predictions=True)
low, high = result.intervals["top1"]
print(f"accuracy {result.metrics['top1']:.1%}, between {low:.1%} and {high:.1%}")

classes = list(test.classes)
confusion = np.zeros((len(classes), len(classes)), int)
for _, expected, predicted in result.predictions:
    confusion[classes.index(expected), classes.index(predicted)] += 1
figure, axis = plt.subplots(figsize=(5.6, 5))
axis.imshow(confusion, cmap="Blues")
axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
axis.set_yticks(range(len(classes)), classes)
if len(classes) <= 12:
    for (row, column), count in np.ndenumerate(confusion):
        axis.text(column, row, count, ha="center", va="center",
                  color="white" if count > confusion.max() / 2 else "black")
axis.set_xlabel("predicted")
axis.set_ylabel("expected")
axis.set_title("Test images")
figure.tight_layout()
plt.show()

# %%
mistakes = result.mistakes[::max(1, len(result.mistakes) // 7)][:7]
if mistakes:
    show([Image.open(folder / "test" / mistake.key) for mistake in mistakes],
         [f"{mistake.expected},\nnot {mistake.predicted}" for mistake in mistakes])
else:
    print("no mistakes")

# %% [markdown]
# ## Fine-tune the CLIP itself
#
# A classifier knows its classes only. A CLIP takes any text. It learns from images with captions, which here are made
# of the names of the classes; your own captions do as well: `captions:FILE.jsonl`, with `image` and `caption` on every
# line.

# %%
for split, source in (("train", train), ("test", test)):
    rows = [{"image": str(folder / split / source.key(i)), "caption": f"a sketch of a {source.classes[label]}"}
            for i, label in enumerate(source.labels)]
    (WORK / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
print((WORK / "train.jsonl").read_text().splitlines()[0])

recipe = jaxmm.load_recipe("finetune_captions")
data = replace(recipe.data, train=f"captions:{WORK / 'train.jsonl'}", val=None, batch_size=BATCH, image=image)
optimizer = recipe.optimizer if FOLDER else replace(recipe.optimizer, learning_rate=3e-4)
jaxmm.train(replace(recipe, data=data, init=jaxmm.InitConfig(source=start), steps=STEPS, optimizer=optimizer,
                    evals=(), eval_every=None, log_every=every), WORK / "tuned-clip")
clip = jaxmm.load(WORK / "tuned-clip")
[after] = jaxmm.evaluate(clip, test, evaluators=["zero_shot"], templates=["a sketch of a {}"])
for name, measured in (("before", before), ("after", after)):
    print(f"accuracy of the CLIP {name}: {measured.metrics['zero_shot_top1']:.0%}")

# %% [markdown]
# It searches the test images by text:

# %%
embeddings = clip.encode_image([folder / "test" / test.key(i) for i in range(len(test))])
for name in test.classes[:3]:
    cosines = embeddings @ clip.encode_text(f"a sketch of a {name}")[0]
    best = np.argsort(-cosines)[:7]
    print(f"“a sketch of a {name}”")
    show([Image.open(folder / "test" / test.key(i)) for i in best], [f"cosine {cosines[i]:.2f}" for i in best])

# %% [markdown]
# ## Save it
#
# `load` reads the folder again. `save` also writes what other libraries load (`format="open_clip"`, if the model is one
# of theirs), as `jaxmm convert` does on the command line.

# %%
clip.save(WORK / "my-clip")
print(*sorted(path.name for path in (WORK / "my-clip").iterdir()), sep="\n")
