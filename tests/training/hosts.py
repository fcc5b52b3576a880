"""Processes that train together, forked from one that has imported everything: `python -m tests.training.hosts`.

A line of JSON on stdin, `{"args": [FOLDER, RUNS, OUT, ...], "devices": D, "output": FILE}`, starts one and is answered
with its number; `{"wait": NUMBER}` with its exit status. FOLDER/data holds pictures, FOLDER/OUT/RUN are the work
folders. Host H writes a line of FOLDER/OUT/steps-H a step. `--block H STEP` stops host H for good in that step; `--odd
H` gives host H another seed.
"""

import argparse
import json
import os
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
from matplotlib.figure import Figure

from jaxmm import hosts
from jaxmm.config import CheckpointConfig, DataConfig, ImageConfig, MeshConfig, TrainConfig
from jaxmm.data.base import DataError
from jaxmm.evals import Captions, Retrieval, TopKAccuracy, caption_metrics
from jaxmm.inference.generate import Decoding
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.loop import train
from tests.training.common import clip_run
from tests.xla import flags

STEPS, EVERY = 4, 2
STACK = {"depth": 2, "heads": 2, "dropout": 0.1}
VISION = ViTConfig(transformer=TransformerConfig(width=24, mlp_dim=40, **STACK), image_size=16, patch=4)
TEXT = MedConfig(transformer=TransformerConfig(width=16, mlp_dim=56, eps=1e-12, **STACK), context_width=24,
                 positions=16, vocab_size=None)
BLIP = BLIPPretraining(model=BLIPConfig(vision=VISION, text=TEXT, embed_dim=20), queue=31, momentum=0.9, ramp=4)
VIT = Classification(model=replace(VISION, transformer=replace(VISION.transformer, dropout=0.0), patch=8), mixup=0.4)


def config(name: str, folder: Path) -> TrainConfig:
    """CLIP, SigLIP and BLIP on scenes, or ViT on a `few` pictures of which some are broken."""
    run = clip_run(folder / "data", steps=STEPS, mesh=MeshConfig(),
                   checkpoint=CheckpointConfig(every=EVERY, keep=9), evals=(Retrieval(batch_size=40, examples=0),))
    # a gradient that is nothing but rounding must not become a step of Adam's
    run = replace(run, data=replace(run.data, val="scenes:tiny/val"), optimizer=replace(run.optimizer, eps=1e-4))
    if name == "clip":
        return run
    if name == "siglip":
        model = replace(run.task.model, logit_bias=-10.0, text=replace(run.task.model.text, causal=False, pool="last"))
        return replace(run, task=replace(run.task, kind="sigmoid", model=model))
    if name == "blip":
        written = Captions(decoding=Decoding(max_length=8), limit=9, batch_size=8, examples=0)
        return replace(run, task=BLIP, evals=(*run.evals, written))
    data = DataConfig(train=f"folder:{folder}/few/train", val=f"folder:{folder}/few/val", batch_size=8, max_bad=1.0,
                      image=ImageConfig(size=16, train_crop="center", flip=False))
    return replace(run, task=VIT, data=data, evals=(TopKAccuracy(batch_size=4),))


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs")
    parser.add_argument("out")
    parser.add_argument("--hosts", nargs=3, default=(None, 1, 0))
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--heartbeat", type=float, default=20.0)
    parser.add_argument("--block", type=int, nargs=2)
    parser.add_argument("--odd", type=int)
    parser.add_argument("--endless", action="store_true")
    options = parser.parse_args(args)
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
        with hosts.distributed(joining, out):
            if not address:
                assert_no_device_was_touched()
            assert jax.process_count() == count
            for name in options.runs.split(","):
                run = config(name, options.folder)
                if options.endless:
                    run = replace(run, steps=10**6, checkpoint=CheckpointConfig(every=10**6))
                train(replace(run, seed=99) if options.odd == index else run, out / name, observe=observe)
    except (ValueError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return hosts.exit_status(2)
    return 0


def assert_no_device_was_touched() -> None:
    """JAX could still be distributed."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0)
    jax.distributed.shutdown()


def serve() -> int:
    """Starts processes until stdin is closed; in each of these, its exit status."""
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        elif number := os.fork():
            print(number, flush=True)
        else:
            output = os.open(order["output"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["XLA_FLAGS"] = flags(order["devices"])
            return main(order["args"])
    return 0


if __name__ == "__main__":
    Figure.savefig = lambda figure, out, **_: out.write("<svg></svg>")
    caption_metrics.java_version = lambda: None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(serve())
