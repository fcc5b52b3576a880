"""Memory that a contrastive loss and its gradient take on a chip, by the compiler: whole logits against blocks.

    python -m benchmarks.loss_memory [--out benchmarks/results/loss_memory.md]

Width 768, fp32, value and gradient by both embeddings (and of BLIP's loss, with a queue of 57,600, by the student's).
What is counted is what the loss adds: temporaries and gradients, without the embeddings that go in. Nothing is run; for
v5e libtpu compiles (`pip install 'jaxmm[tpu]'`); temporaries that never leave the chip's own memory do not count.
Inf-CL (Cheng et al. 2024) publishes, for eight devices, 0.18, 0.72, 1.45 and (with offloading) 6.53 GB for batches of
32k, 128k, 256k and 1M.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxmm.atomic import write_atomically
from jaxmm.config import MeshConfig
from jaxmm.losses.blockwise import (
    NOT_IN_BATCH,
    Anchors,
    Candidates,
    Distilled,
    Sigmoid,
    Softmax,
    blockwise_contrastive,
    blockwise_loss,
    pair_keys,
)
from jaxmm.losses.contrastive import contrastive_logits, positive_mask, sigmoid_contrastive, softmax_contrastive
from jaxmm.planning.chips import open_topology
from jaxmm.planning.plan import requested_bytes
from jaxmm.sharding import batch_sharding, constrain_batch, make_mesh, replicated

WIDTH, QUEUE, TILE = 768, 57_600, 1024
BATCHES = 2**15, 2**17, 2**18, 2**20
TARGETS = "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"
SHARE = 4096
WHOLE = {"softmax": softmax_contrastive, "sigmoid": sigmoid_contrastive}
BLOCKS = {"softmax": Softmax, "sigmoid": Sigmoid}


def whole(kind):
    """Logits of all pairs, rows where their pictures are."""
    def loss(image, text, ids, scale, bias):
        return WHOLE[kind](contrastive_logits(image, text, scale, bias),
                           constrain_batch(positive_mask(ids, None, len(image))))
    return loss


def blocks(kind):
    """The same in blocks."""
    def loss(image, text, ids, scale, bias):
        return blockwise_contrastive(BLOCKS[kind], image, text, (ids,), scale, bias, tile=TILE)[0]
    return loss


def distilled(image, text, ids, scale, bias):
    """BLIP's, one direction; the teacher's embeddings are the other arguments'."""
    teacher, queue = jax.lax.stop_gradient(image), jnp.zeros((QUEUE, WIDTH))
    keys = pair_keys((ids,), jnp.arange(len(image))), pair_keys((jnp.zeros((QUEUE, 2), jnp.int32),),
                                                                jnp.full(QUEUE, NOT_IN_BATCH))
    return blockwise_loss(Distilled, Anchors((image, teacher), keys[0]), Candidates((text, queue), keys), scale, bias,
                   jnp.float32(0.4), tile=TILE)[0]


def taken(loss, batch: int, devices) -> int | str:
    """Bytes on a device; in words where the compiler gives up."""
    mesh = make_mesh(MeshConfig(), devices)
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype, where in (
        *[((batch, WIDTH), jnp.float32, rows)] * 2, ((batch, 2), jnp.int32, rows),
        *[((), jnp.float32, everywhere)] * 2)]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(everywhere, (rows, rows)))
        try:
            memory = step.lower(*inputs).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            asked = requested_bytes(str(error))
            if asked is None:
                raise
            return f"does not fit ({asked / 1e9:,.0f})"
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def told(size: int | str) -> str:
    """GB."""
    return size if isinstance(size, str) else f"{size / 1e9:.3f}"


def main() -> None:
    """Compiles, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loss_memory.md")
    args = parser.parse_args()
    targets = {name: open_topology(name).devices for name in TARGETS}
    losses = {f"{kind}, {how.__name__}": how(kind) for kind in WHOLE for how in (whole, blocks)}
    losses["BLIP's with queue, blocks"] = distilled
    text = ["# Memory of contrastive losses", "",
            "Made by `python -m benchmarks.loss_memory`: GB that value and gradient add on a chip (temporaries and",
            f"gradients; embeddings of width {WIDTH} in fp32 go in), compiled by libtpu for chips that were not there",
            "(temporaries that never leave the chip's own memory do not count).",
            "Inf-CL's published figures for eight devices: 0.18 (32k), 0.72 (128k), 1.45 (256k), 6.53 (1M).", "",
            f"| loss | chips | {' | '.join(f'{size // 1024}k' for size in BATCHES)} |", f"|{' --- |' * 6}"]
    for name, loss in tqdm(losses.items(), unit=" losses"):
        for target, devices in targets.items():
            sizes = [told(taken(loss, size, devices)) for size in BATCHES]
            text.append(f"| {name} | {target} | {' | '.join(sizes)} |")
    text += ["", f"At {SHARE:,} pairs a chip, however many chips:", "",
             f"| loss | {' | '.join(TARGETS[1:])} |", f"|{' --- |' * len(TARGETS)}"]
    for name, loss in losses.items():
        if "blocks" in name:
            sizes = [told(taken(loss, SHARE * len(targets[target]), targets[target])) for target in TARGETS[1:]]
            text.append(f"| {name} | {' | '.join(sizes)} |")
    write_atomically(args.out, "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
