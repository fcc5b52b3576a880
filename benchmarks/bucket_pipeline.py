"""Input pipeline from a bucket against local files: images per second, requests, bytes fetched, size of the cache.

    python -m benchmarks.bucket_pipeline [--images 2000] [--faults 0.05] [--cache GIB] [--rounds 3] [--json]

A fake-gcs-server on this machine holds tars of generated JPEG files (500 x 375 pixels); the first epoch fetches them,
the second one reads the cache. Rounds alternate between local files and the bucket, each with an empty cache. A proxy
counts the requests and lets a share of them fail.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.measure import draw
from tests.bucket_servers import BUCKET, Proxy, gcs_environment, gcs_server

BATCH, SHARDS = 32, 4


def write_tars(folder: Path, count: int) -> None:
    """Write `count` images as web shards."""
    draw(folder, min(count, 200))
    files = sorted((folder / "drawn").iterdir())
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(shard, count, SHARDS):
                tar.add(files[number % len(files)], f"{number:06}.jpg")


def speed(spec: str, count: int, workers: int) -> dict[str, float]:
    """Return images per second in the first two epochs, the opening of the source apart."""
    from jaxmm.config import DataConfig, ImageConfig
    from jaxmm.data.pipeline import train_batches
    from jaxmm.data.sources.registry import open_source

    since = time.perf_counter()
    source = open_source(spec)
    len(source)
    figures = {"opening_s": time.perf_counter() - since}
    batches = train_batches(source, DataConfig(batch_size=BATCH, workers=workers, image=ImageConfig(size=224)), seed=0)
    for epoch in ("first_epoch", "second_epoch"):
        since, steps = time.perf_counter(), count // BATCH
        for _ in range(steps):
            next(batches)
        figures[epoch] = steps * BATCH / (time.perf_counter() - since)
    batches.close()
    return figures


def in_a_process(spec: str, options: argparse.Namespace) -> dict[str, float]:
    """Return `speed` of a new process, which ends after its last request."""
    command = [sys.executable, "-m", "benchmarks.bucket_pipeline", "--spec", spec, "--images", options.images,
               "--workers", options.workers]
    return json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--cache", type=float, help="limit of the cache in GiB")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--spec", help="measure this source only, as the other processes do")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.spec is not None:
        print(json.dumps(speed(options.spec, options.images, options.workers)))
        return
    proxy = Proxy()
    with tempfile.TemporaryDirectory() as name, gcs_server(proxy.port) as proxy.target:
        folder = Path(name)
        os.environ |= gcs_environment(proxy.port) | {"JAXMM_BUCKET_TIMEOUT": "10" if options.faults else "60"}
        if options.cache is not None:
            os.environ["JAXMM_BUCKET_CACHE"] = str(options.cache)
        from jaxmm.object_cache import used
        from jaxmm.paths import user_path

        write_tars(folder, options.images)
        for path in folder.glob("*.tar"):
            user_path(f"gs://{BUCKET}/data/{path.name}").upload(path)
        size, rounds = sum(path.stat().st_size for path in folder.glob("*.tar")), []
        for number in range(options.rounds):
            os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{number}")
            proxy.requests.clear()
            near = in_a_process(f"tars:{folder}/*.tar", options)
            proxy.faults = options.faults
            far = in_a_process(f"tars:gs://{BUCKET}/data/*.tar", options)
            proxy.faults = 0.0
            ranges = [value.removeprefix("bytes=").split("-") for _, _, value in proxy.requests if value]
            rounds.append({"local": near, "bucket": far, "requests": len(proxy.requests), "failed": dict(proxy.failed),
                           "fetched_share": sum(int(stop) + 1 - int(start) for start, stop in ranges) / size,
                           "cache_MiB": used() / 2**20})
        proxy.close()
    ratio = {epoch: statistics.median(r["bucket"][epoch] / r["local"][epoch] for r in rounds)
             for epoch in ("first_epoch", "second_epoch")}
    result = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "bytes": size,
              "images": options.images, "faults": options.faults, "ratio": ratio, "rounds": rounds}
    print(json.dumps(result, indent=1) if options.json else
          "\n".join([*map(str, rounds), f"bucket / local, median: {ratio}"]))


if __name__ == "__main__":
    main()
