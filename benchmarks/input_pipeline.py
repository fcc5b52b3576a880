"""Input pipeline in images/s per core: jaxmm against torch's DataLoader, the same work on the same bytes.

Both read JPEG files, decode them, take a random resized crop (bicubic, 224 pixels), flip half of them and collate uint8
batches. Theirs is what a PyTorch user writes: a map-style `Dataset` around Pillow, `DataLoader`, its collation.

    python -m benchmarks.input_pipeline [--data-dir DIR] [--workers N] [--json]

Rounds alternate (ours, theirs, ours, ...); medians are compared. Without `--data-dir` the images are generated: 500 x
375 pixels with structure at all scales, about as many bytes as a photograph of that size.
"""

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import draw
from jaxmm.config import DataConfig, ImageConfig
from jaxmm.data.pipeline import train_batches
from jaxmm.data.sources.registry import open_source

BATCH = 32


class TorchImages(torch.utils.data.Dataset):
    """One folder per class, read as a PyTorch user does."""

    def __init__(self, files: list[str], labels: list[int], size: int):
        self.files, self.labels, self.size = files, labels, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index: int):
        """Decode, random resized crop, flip; uint8 channels first."""
        with Image.open(self.files[index]) as image:
            image = image.convert("RGB")
        left, top, width, height = self.crop(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.labels[index]

    def crop(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Draw a crop like torchvision's `RandomResizedCrop.get_params`."""
        for _ in range(10):
            area = width * height * float(torch.empty(()).uniform_(0.08, 1.0))
            aspect = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ())), w, h
        return 0, 0, width, height


def ours(source, workers: int, size: int, seed: int):
    """Return jaxmm's batches."""
    config = DataConfig(batch_size=BATCH, workers=workers, image=ImageConfig(size=size))
    return train_batches(source, config, seed=seed)


def theirs(source, workers: int, size: int, seed: int):
    """Return torch's batches, sampled with replacement so that an epoch does not end."""
    torch.manual_seed(seed)
    data = TorchImages([os.path.join(source.root, f) for f in source.files], source.labels.tolist(), size)
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**6)
    return iter(torch.utils.data.DataLoader(data, BATCH, sampler=sampler, num_workers=workers))


def rate(batches, count: int, per_cpu: bool) -> float:
    """Return images/s after the first batches, by wall-clock time or by CPU time of this process.

    For a process bound to one core, CPU time does not depend on other programs.
    """
    for _ in range(4):
        next(batches)
    clock = time.process_time if per_cpu else time.perf_counter
    start = clock()
    for _ in range(count // BATCH):
        next(batches)
    elapsed = clock() - start
    if hasattr(batches, "close"):
        batches.close()
    return count // BATCH * BATCH / elapsed


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="JPEG images, one folder per class (default: generated ones)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the second comparison")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pictures", type=int, default=512, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print objects instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpus = os.sched_getaffinity(0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if not args.data_dir:
            draw(Path(folder), 64)
        source = open_source(f"folder:{args.data_dir or folder}")
        size = sum(os.path.getsize(os.path.join(source.root, f)) for f in source.files[:200]) / len(source.files[:200])
        for workers in (0, args.workers):
            cores = 1 if workers == 0 else min(workers, len(cpus))
            rates = {ours: [], theirs: []}
            if workers == 0:
                os.sched_setaffinity(0, {min(cpus)})
            for seed in range(args.rounds):
                for side, values in rates.items():
                    batches = side(source, workers, args.size, seed)
                    values.append(rate(batches, args.pictures, per_cpu=workers == 0) / cores)
            os.sched_setaffinity(0, cpus)
            a, b = (statistics.median(values) for values in rates.values())
            results.append({
                "name": f"{workers} workers, per second and core" if workers else "one process, per second of its core",
                "ours_per_s": round(a, 1), "theirs_per_s": round(b, 1), "ratio": round(a / b, 3),
                "workers": workers, "size": args.size, "kb_a_picture": round(size / 1000, 1),
                "pictures": "given" if args.data_dir else "drawn 500 x 375", "cores": len(cpus),
                "load": round(os.getloadavg()[0], 1), "machine": platform.machine(), "torch": torch.__version__,
            })
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{results[0]['pictures']} JPEGs of {results[0]['kb_a_picture']} kB -> {args.size} x {args.size}")
    print(f"{'':40} {'ours/s':>9} {'torch/s':>9} {'ratio':>7}")
    for r in results:
        print(f"{r['name']:40} {r['ours_per_s']:9.1f} {r['theirs_per_s']:9.1f} {r['ratio']:7.3f}")


if __name__ == "__main__":
    main()
