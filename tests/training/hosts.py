"""One of several processes that train together: `python -m tests.training.hosts FOLDER RUNS [options]`.

FOLDER/data holds pictures, FOLDER/OUT/RUN are the work folders. Host H writes a line of FOLDER/OUT/steps-H a step.
`--block H STEP` stops host H for good in that step; `--odd H` gives host H another seed.
"""

import argparse
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax

from jaxmm.config import CheckpointConfig, DataConfig, ImageConfig, MeshConfig, TrainConfig
from jaxmm.data.sources import DataError
from jaxmm.evals import Captions, Classification, Retrieval
from jaxmm.generate import Decoding
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.blip import BLIPPretraining
from jaxmm.tasks.classify import Classify
from jaxmm.training import hosts
from jaxmm.training.loop import train
from tests.training.common import clip_run

STEPS, EVERY = 6, 2
STACK = {"depth": 2, "heads": 2, "dropout": 0.1}
VISION = ViTConfig(transformer=TransformerConfig(width=24, mlp_dim=40, **STACK), image_size=16, patch=4)
TEXT = MedConfig(transformer=TransformerConfig(width=16, mlp_dim=56, eps=1e-12, **STACK), context_width=24,
                 positions=24)
BLIP = BLIPPretraining(model=BLIPConfig(vision=VISION, text=TEXT, embed_dim=20), queue=31, momentum=0.9, ramp=4)
VIT = Classify(model=replace(VISION, transformer=replace(VISION.transformer, dropout=0.0), patch=8), mixup=0.4)


def config(name: str, folder: Path) -> TrainConfig:
    """ViT on digits, CLIP, SigLIP and BLIP on scenes, or ViT on a `few` pictures of which some are broken."""
    run = clip_run(folder / "data", steps=STEPS, mesh=MeshConfig(),
                   checkpoint=CheckpointConfig(every=EVERY, keep=9), evals=(Retrieval(batch_size=30, examples=2),))
    # a gradient that is nothing but rounding must not become a step of Adam's
    run = replace(run, data=replace(run.data, val="scenes:tiny/val"), optimizer=replace(run.optimizer, eps=1e-4))
    if name == "clip":
        return run
    if name == "siglip":
        model = replace(run.task.model, logit_bias=-10.0, text=replace(run.task.model.text, causal=False, pool="last"))
        return replace(run, task=replace(run.task, kind="sigmoid", model=model))
    if name == "blip":
        written = Captions(decoding=Decoding(max_length=8), limit=9, batch_size=8, examples=2)
        return replace(run, task=BLIP, evals=(*run.evals, written))
    image = ImageConfig(size=16, train_crop="center", flip=False)
    data = DataConfig(train="digits:train", val="digits:test", batch_size=16, image=image)
    if name == "few":
        data = replace(data, train=f"folder:{folder}/few/train", val=f"folder:{folder}/few/val", batch_size=8,
                       max_bad=1.0)
    return replace(run, task=VIT, data=data, evals=(Classification(batch_size=13 if name == "vit" else 4),))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs")
    parser.add_argument("out")
    parser.add_argument("--hosts", nargs=3, default=(None, 1, 0))
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--heartbeat", type=float, default=20.0)
    parser.add_argument("--block", type=int, nargs=2)
    parser.add_argument("--odd", type=int)
    options = parser.parse_args()
    address, count, index = options.hosts[0], int(options.hosts[1]), int(options.hosts[2])
    out = options.folder / options.out
    out.mkdir(parents=True, exist_ok=True)
    joining = hosts.HostsConfig(timeout=options.timeout, heartbeat=options.heartbeat, **(
        {"address": address, "count": count, "index": index} if address else {}))
    steps = (out / f"steps-{index}").open("w")

    def observe(step, batch):
        steps.write(f"{step} {batch['index'].tolist()}\n")
        steps.flush()
        if options.block == [index, step]:
            threading.Event().wait()

    try:
        with hosts.joined(joining, out):
            assert jax.process_count() == count
            for name in options.runs.split(","):
                run = config(name, options.folder)
                train(replace(run, seed=99) if options.odd == index else run, out / name, observe=observe)
    except (ValueError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.status(2)
    return 0


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(main())
