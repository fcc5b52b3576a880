"""Memory of a contrastive loss and its gradient per chip, by the compiler: all logits against a blockwise loss.

    python -m benchmarks.loss_memory [--out benchmarks/results/loss_memory.md]

Width 768, fp32, value and gradient with respect to both embeddings (for BLIP's loss, with a queue of 57,600, the
student's). Counted are temporaries and gradients, not the input embeddings. Nothing runs: libtpu compiles for v5e (`pip
install 'jaxmm[tpu]'`); temporaries in on-chip memory do not count. Inf-CL (Cheng et al. 2024) publishes, for eight
devices, 0.18, 0.72, 1.45 and (with offloading) 6.53 GB for batches of 32k, 128k, 256k and 1M.
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
    """Return the loss with the logits of all pairs, rows sharded like the images."""
    def loss(image, text, ids, scale, bias):
        return WHOLE[kind](contrastive_logits(image, text, scale, bias),
                           constrain_batch(positive_mask(ids, None, len(image))))
    return loss


def blocks(kind):
    """Return the blockwise loss."""
    def loss(image, text, ids, scale, bias):
        return blockwise_contrastive(BLOCKS[kind], image, text, (ids,), scale, bias, tile=TILE)[0]
    return loss


def distilled(image, text, ids, scale, bias):
    """Compute one direction of BLIP's blockwise loss, with the images' embeddings as the teacher's too."""
    teacher, queue = jax.lax.stop_gradient(image), jnp.zeros((QUEUE, WIDTH))
    keys = pair_keys((ids,), jnp.arange(len(image))), pair_keys((jnp.zeros((QUEUE, 2), jnp.int32),),
                                                                jnp.full(QUEUE, NOT_IN_BATCH))
    return blockwise_loss(Distilled, Anchors((image, teacher), keys[0]), Candidates((text, queue), keys), scale, bias,
                          jnp.float32(0.4), tile=TILE)[0]


def bytes_per_chip(loss, batch: int, devices) -> int | str:
    """Return the bytes per device; a message if it does not fit."""
    mesh = make_mesh(MeshConfig(), devices)
    rows, everywhere = batch_sharding(mesh), replicated(mesh)
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in (
        *[((batch, WIDTH), jnp.float32, rows)] * 2, ((batch, 2), jnp.int32, rows),
        *[((), jnp.float32, everywhere)] * 2)]
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(everywhere, (rows, rows)))
        try:
            memory = step.lower(*inputs).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            requested = requested_bytes(str(error))
            if requested is None:
                raise
            return f"does not fit ({requested / 1e9:,.0f})"
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def format_gb(size: int | str) -> str:
    """Format bytes as GB; leave messages as they are."""
    return size if isinstance(size, str) else f"{size / 1e9:.3f}"


def main() -> None:
    """Compile and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loss_memory.md")
    args = parser.parse_args()
    targets = {name: open_topology(name).devices for name in TARGETS}
    losses = {f"{kind}, {how.__name__}": how(kind) for kind in WHOLE for how in (whole, blocks)}
    losses["BLIP's with queue, blocks"] = distilled
    text = ["# Memory of contrastive losses", "",
            "Made by `python -m benchmarks.loss_memory`: GB per chip of value and gradient (temporaries and",
            f"gradients, without the input embeddings of width {WIDTH} in fp32), compiled ahead of time by libtpu",
            "(temporaries in on-chip memory do not count).",
            "Inf-CL's published figures for eight devices: 0.18 (32k), 0.72 (128k), 1.45 (256k), 6.53 (1M).", "",
            f"| loss | chips | {' | '.join(f'{size // 1024}k' for size in BATCHES)} |", f"|{' --- |' * 6}"]
    for name, loss in tqdm(losses.items(), unit=" losses"):
        for target, devices in targets.items():
            sizes = [format_gb(bytes_per_chip(loss, size, devices)) for size in BATCHES]
            text.append(f"| {name} | {target} | {' | '.join(sizes)} |")
    text += ["", f"At {SHARE:,} pairs per chip, for any number of chips:", "",
             f"| loss | {' | '.join(TARGETS[1:])} |", f"|{' --- |' * len(TARGETS)}"]
    for name, loss in losses.items():
        if "blocks" in name:
            sizes = [format_gb(bytes_per_chip(loss, SHARE * len(targets[target]), targets[target]))
                     for target in TARGETS[1:]]
            text.append(f"| {name} | {' | '.join(sizes)} |")
    write_atomically(args.out, "\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
