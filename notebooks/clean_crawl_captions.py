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
# # Clean the captions of a crawl with CapFilt
#
# Texts beside images on the web are often wrong, cut off, or about something else. BLIP's authors proposed *CapFilt*:
#
# * a **captioner** writes a synthetic caption for every web image,
# * a **filter** scores both texts, and drops those that do not match the image,
# * a new model is trained on what stays, together with images that people captioned.
#
# Here the crawl is generated: 60 % of its captions are noise of known kinds. So we can check the filter.

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
# Published models for photos are `Salesforce/blip-image-captioning-base` and `Salesforce/blip-itm-base-coco`. The drawn
# crawl needs models that know shapes: if `CAPTIONER` and `FILTER` are empty, a small BLIP is trained here.

# %% tags=["parameters"]
CAPTIONER, FILTER = "", ""  # models of the hub, folders or runs
STEPS, FILTER_STEPS = 600, 300  # training steps of the small BLIP, and of the filter that is fine-tuned from it
COMPARED_STEPS = 150  # training steps of each of the two models that are compared at the end
SCENES = "scenes:"
WEB = 800  # images of the crawl
LONGEST = 32  # tokens of a synthetic caption
THRESHOLD = 0.5  # least probability, by the filter, that text and image belong together
POOL = 100  # images that a query is searched among, when the models are compared
BATCH = 64  # of the models that are compared

# %%
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from jaxmm.capfilt.merge import merge
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SELECTED, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.data.images import decode

WORK = Path(tempfile.mkdtemp(prefix="jaxmm-"))  # everything that this notebook writes
DATA = str(WORK / "data")
print("files are written into", WORK)

# %% [markdown]
# ## The crawl
#
# With your own data, `WEB_SOURCE` is such as `tars:crawl/*.tar`.

# %%
WEB_SOURCE = f"{SCENES}web[:{WEB}]"
web = jaxmm.open_source(WEB_SOURCE, data_dir=DATA)
kinds = Counter(web[i]["noise"] for i in range(len(web)))
print(f"{len(web):,} web images;", ", ".join(f"{count / len(web):.0%} {kind}" for kind, count in kinds.most_common()))

figure, axes = plt.subplots(2, 4, figsize=(13, 7), layout="constrained")
for axis, i in zip(axes.flat, range(8), strict=True):
    record = web[i]
    axis.imshow(decode(record["image"]))
    axis.set_title(f"{fill(record['texts'][0], 34)}\n({record['noise']})", fontsize=9,
                   color="tab:green" if record["clean"] else "tab:red")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Captioner and filter
#
# A BLIP is pre-trained on everything, the noisy crawl included. The filter is fine-tuned from it on 2,000 images with
# human captions. The paper fine-tunes a captioner, too; to save time the pre-trained model writes the captions here
# (`configs/capfilt_scenes.py` has all of it).

# %%
if not (CAPTIONER and FILTER):
    recipe, human = jaxmm.load_recipe("capfilt_scenes"), f"{SCENES}train[:2000]"
    for name, stage, source, steps in (("pretrained", recipe.pretrain, f"{SCENES}web + {human}", STEPS),
                                       ("filter", recipe.filter, human, FILTER_STEPS)):
        start = jaxmm.InitConfig(source=str(WORK / "pretrained") if name == "filter" else None)
        jaxmm.train(replace(stage, data=replace(stage.data, train=source, val=None, data_dir=DATA), init=start,
                            steps=steps, evals=()), WORK / name)
captioner, judge = CAPTIONER or str(WORK / "pretrained"), FILTER or str(WORK / "filter")

# %% [markdown]
# ## Caption, score, select
#
# Each stage writes Parquet files into the folder, and continues if it is interrupted. Captions are sampled from the
# likeliest tokens (nucleus sampling), because varied captions teach more than safe ones. A text stays if the matching
# head finds it more likely than not that it belongs to its image.

# %%
folder = begin(WORK / "better", WEB_SOURCE, None, size=WEB, data_dir=DATA)  # one shard of all images
sampled = jaxmm.Decoding(sample=True, top_p=0.9, max_length=LONGEST)
write_captions(folder, [captioner], CaptionOptions(decoding=sampled))
write_scores(folder, judge)
select(folder, Rule(threshold=THRESHOLD))

texts = [{name: table.columns[name][row] for name in ("record", "text", "origin", "itm", "kept")}
         for table in folder.tables(SELECTED) for row in range(len(table))]
for origin in ("web", "synthetic"):
    kept = [text["kept"] for text in texts if text["origin"] == origin]
    print(f"{origin} texts: {len(kept):,}, {np.mean(kept):.0%} stay")

# %% [markdown]
# ## Is the filter right?
#
# Nobody tells the filter which captions are noise. If it is good, its scores separate them all the same: noise on the
# left, true texts on the right.

# %%
of_web = [text for text in texts if text["origin"] == "web"]
clean = np.array([web[text["record"]]["clean"] for text in of_web])
score = np.array([text["itm"] for text in of_web])
kept = np.array([text["kept"] for text in of_web])
print(f"of the true web texts {kept[clean].mean():.0%} stay, of the noise {kept[~clean].mean():.0%}")

figure, axes = plt.subplots(1, 2, figsize=(12, 3.6))
bins = np.linspace(0, 1, 26)
for mask, label, color in ((clean, "true", "tab:green"), (~clean, "noise", "tab:red")):
    axes[0].hist(score[mask], bins, alpha=0.6, label=label, color=color)
axes[0].axvline(THRESHOLD, color="black", linestyle="--", label="threshold")
axes[0].set_xlabel("probability that text and image belong together")
axes[0].set_ylabel("web texts")
axes[0].legend()
names = [kind for kind, _ in kinds.most_common()]
shares = [kept[[web[text["record"]]["noise"] == kind for text in of_web]].mean() for kind in names]
bars = axes[1].bar(names, shares, color=["tab:green" if kind == "correct" else "tab:red" for kind in names])
axes[1].bar_label(bars, fmt="{:.0%}")
axes[1].set_ylim(0, 1.1)
axes[1].set_ylabel("share that stays")
axes[1].set_xlabel("kind of web text")
figure.tight_layout()
plt.show()

# %%
records = [of_web[row]["record"] for row in np.argsort(kept, kind="stable")[:4]]  # those that lose their text first
figure, axes = plt.subplots(1, len(records), figsize=(3.6 * len(records), 4.6), squeeze=False,
                            layout="constrained")
for axis, record in zip(axes.flat, records, strict=True):
    axis.imshow(decode(web[record]["image"]))
    axis.axis("off")
    lines = [f"{text['origin']}, {text['itm']:.2f}, {'stays' if text['kept'] else 'goes'}:\n{fill(text['text'], 36)}"
             for text in texts if text["record"] == record]
    axis.set_title("\n".join(lines), fontsize=9, loc="left")
plt.show()

# %% [markdown]
# ## Does it help?
#
# Two small CLIPs, the same recipe and number of steps: one learns from the crawl as it is, one from the texts that
# stay. Both are measured on held-out images with true captions.

# %%
merged = merge(folder)
recipe = jaxmm.load_recipe("clip_scenes")
recalls = {}
for name, source in (("the crawl as it is", WEB_SOURCE), ("after CapFilt", f"tfds:{merged}:web")):
    data = replace(recipe.data, train=source, val=f"{SCENES}val", batch_size=BATCH, data_dir=DATA)
    workdir = WORK / name.replace(" ", "-")
    metrics = jaxmm.train(replace(recipe, data=data, steps=COMPARED_STEPS, evals=(jaxmm.Retrieval(pool=POOL),),
                                  eval_every=None, log_every=max(1, COMPARED_STEPS // 10)), workdir)
    recalls[name] = metrics["val/i2t_recall@5"], metrics["val/t2i_recall@5"]

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4))
places = np.arange(2)
for shift, (name, values) in zip((-0.2, 0.2), recalls.items(), strict=True):
    axis.bar_label(axis.bar(places + shift, values, 0.38, label=name), fmt="%.2f")
axis.axhline(5 / POOL, color="grey", linestyle="--", label="chance")
axis.set_xticks(places, ["image to text", "text to image"])
axis.set_ylabel(f"recall@5 among {POOL}")
axis.set_ylim(0, 1.2 * max(max(values) for values in recalls.values()))
axis.legend(title="trained on", bbox_to_anchor=(1.02, 1), loc="upper left")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Next
#
# * On your own crawl: `jaxmm capfilt run --captioner Salesforce/blip-image-captioning-large --filter
#   Salesforce/blip-itm-large-coco --web 'tars:crawl/*.tar' --human coco:captions.json --out better` runs all stages, on
#   any number of hosts, merges what stays with the human captions, and writes a report.
# * `docs/capfilt.md` goes from a crawl to a trained model.
