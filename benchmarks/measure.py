"""Shared by the benchmarks: worker processes that take turns, timing, and a description of the machine."""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

# glibc returns XLA's work space to the system after every step and maps it again before the next, page fault by page
# fault. With these settings the memory stays with the process.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def draw(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write images with the 1/f spectrum of photographs."""
    folder = folder / "drawn"
    folder.mkdir()
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size[1])[:, None], np.fft.rfftfreq(size[0])[None])
    frequency[0, 0] = 1
    for number in range(count):
        noise = np.fft.rfft2(rng.standard_normal((3, size[1], size[0])), axes=(1, 2)) / frequency**1.1
        waves = np.fft.irfft2(noise, s=(size[1], size[0]), axes=(1, 2))
        grey = waves[:1] / waves[0].std() + 0.3 * waves / waves.std()
        pixels = np.clip(128 + 55 * grey, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)


def vendor_shim(folder: Path) -> Path | None:
    """Compile a library that makes MKL treat every processor like Intel's; None if there is no C compiler.

    MKL does not use AVX-512 on other vendors' processors; with this library preloaded, torch reaches MKL's full speed
    there (pytorch/builder#504).
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, library = folder / "vendor.c", folder / "vendor.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def tuned_arms(folder: Path) -> dict[str, dict[str, str]]:
    """Return the environments of CPU workers: as installed, and tuned (its files go to `folder`)."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "JAX_PLATFORMS": "cpu"}
    shim = vendor_shim(folder)
    tuned = {} if shim is None else {"tuned": threads | KEEP_MEMORY | {"LD_PRELOAD": str(shim)}}
    return {"as installed": threads} | tuned


def options(about: str | None, rounds: int = 3) -> argparse.ArgumentParser:
    """Return a command-line parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="number of valid rounds")
    parser.add_argument("--force", action="store_true", help="record on a busy machine too (the record says so)")
    return parser


class Worker:
    """A process that answers requests. It prints JSON lines: a description first, then one answer per request."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, env=os.environ | (env or {}))
        self.about = self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.log.seek(0)
        sys.exit(f"a worker of the benchmark died:\n{self.log.read()[-4000:]}")

    def ask(self, request: str) -> dict:
        """Send a request and wait for the answer."""
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def serve(about: dict, answers: dict):
    """Run a worker: print `about`, then answer every line of standard input with `answers[line]()`."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def import_torch():
    """Return torch, with what a torchvision beside a CPU build lacks to be imported; nothing calls it."""
    import importlib.util

    import torch
    if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torch.operators = operators  # they last as long as this object
    return torch


def seconds(function) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def is_busy(force: bool) -> bool:
    """Return True if the load average is above a quarter of the cores; exit in that case, unless forced."""
    busy = os.getloadavg()[0] > 0.25 * len(os.sched_getaffinity(0))
    if busy and not force:
        sys.exit(f"the load average is {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores: wait until "
                 "nothing else runs, or --force.")
    return busy


def product_pace() -> Callable[[], dict]:
    """Return a function that times a matrix product, for the `pace` request."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    return lambda: {"s": min(seconds(lambda: a @ a) for _ in range(20))}


class Rounds:
    """Times of workers that take turns; a round is valid if the machine was at its best speed before and after it.

    `pace` is the worker whose `pace` request, a fixed piece of work, runs before and after each round.
    """

    def __init__(self, workers: dict[str, Worker], pace: Worker, tolerance: float):
        self.workers, self.pace, self.tolerance = workers, pace, tolerance
        self.rounds: list[tuple[float, dict[str, float]]] = []

    def measure(self, wanted: int, max_rounds: int):
        """Measure up to `max_rounds` rounds, until `wanted` of them are valid."""
        for worker in self.workers.values():
            worker.ask("run")
        before = self.pace.ask("pace")["s"]
        while len(self.rounds) < max_rounds and len(self.valid()) < wanted:
            times = {}
            for name, worker in self.workers.items():
                time.sleep(0.2)  # until the last one's threads have stopped spinning
                times[name] = worker.ask("run")["s"]
            after = self.pace.ask("pace")["s"]
            self.rounds.append((max(before, after), times))
            before = after

    def valid(self) -> list[dict[str, float]]:
        """Return the rounds during which the machine was within `tolerance` of its best speed."""
        if not self.rounds:
            return []
        best = min(pace for pace, _ in self.rounds)
        return [times for pace, times in self.rounds if pace <= best * (1 + self.tolerance)]

    def median(self, name: str) -> float:
        """Return the median time of a worker over the valid rounds."""
        return statistics.median(times[name] for times in self.valid())


def machine() -> dict:
    """Describe the machine and the versions of libraries."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        processor = names[0] if names else processor
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch", "transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), "system": platform.system(),
            "python": platform.python_version(), "versions": versions}
