"""Cycles of the attention kernels in a program: XLA has no estimate of them, but the compiler writes their schedules.

A TPU executes one bundle of instructions per cycle. Each kernel is compiled in a separate process whose libtpu dumps
its schedules; the bundles of one grid step are counted there, since heads are unrolled.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmm.atomic import write_atomically
from jaxmm.nn import tpu_attention
from jaxmm.planning.chips import open_topology
from jaxmm.planning.hlo import Kernel

SMALLEST_TOPOLOGY = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32, "s32": jnp.int32}


def cycles(kernel: Kernel, kind: str, cache: Path | None) -> int | None:
    """Return the cycles of one run of `kernel` on a chip of `kind` without waiting for memory; None if unknown.

    The first call takes seconds; results are stored in the folder `cache`.
    """
    steps = _grid_steps(kernel)
    if steps is None:
        return None
    rows = ", ".join(f"{dtype}{list(shape[1:])}" for dtype, shape in kernel.inputs)      # one step, for any batch size
    key = f"{kernel.name} {rows} {kind} {importlib.metadata.version('libtpu')}"
    file = None if cache is None else cache / "kernels.json"
    known = json.loads(file.read_text()) if file and file.exists() else {}
    if key not in known:
        known[key] = _bundles(kernel, kind)
        if file is not None and known[key] is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(known, indent=1))
    return None if known[key] is None else known[key] * steps


def _grid_steps(kernel: Kernel) -> int | None:
    """Return the steps of the kernel's grid; None if it is not one of `tpu_attention`."""
    heads = re.fullmatch(r"attention(?:_gradients)?_of_(\d+)_heads", kernel.name)
    if heads is None:
        return None
    (kind, (b, t, width)), (_, (_, s, _)) = kernel.inputs[:2]
    count = int(heads[1])
    return b * count // tpu_attention.heads_at_once(t, s, count, width // count, jnp.dtype(TYPES[kind]).itemsize)


def _bundles(kernel: Kernel, kind: str) -> int | None:
    """Compile `kernel` in a separate process and read its schedule."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip()}
        command = [sys.executable, "-m", "jaxmm.planning.kernels", kind, kernel.name, json.dumps(kernel.inputs)]
        subprocess.run(command, env=environment, capture_output=True, check=False)
        for file in Path(folder).glob(f"*{kernel.name}*schedule-analysis_final_bundles.txt"):
            if total := re.search(r"total scheduled bundles:\s+(\d+)", file.read_text()):
                return int(total[1])
    return None


def _compile(kind: str, name: str, inputs: list) -> None:
    """Compile one kernel for one chip."""
    device = np.array(open_topology(SMALLEST_TOPOLOGY[kind]).devices[:1])
    sharding = NamedSharding(Mesh(device, ("one",)), PartitionSpec())
    heads, backward = int(re.search(r"_of_(\d+)_", name)[1]), "gradients" in name
    arrays = 4 if backward else 3
    shapes = [jax.ShapeDtypeStruct((4, n, heads, width // heads), TYPES[dtype], sharding=sharding)
              for dtype, (_, n, width) in inputs[:arrays]]
    if len(inputs) > arrays:
        _, (b, t, s) = inputs[arrays]
        shapes.append(jax.ShapeDtypeStruct((min(b, 4), 1, t, s), jnp.bool_, sharding=sharding))
    jax.jit(tpu_attention.gradients if backward else tpu_attention.attention).lower(*shapes).compile()


if __name__ == "__main__":
    _compile(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
