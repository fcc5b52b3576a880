"""`jaxmm eval`."""

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import jax
from tqdm import tqdm

from jaxmm.atomic import write_atomically
from jaxmm.cli.evaluation_page import COLUMNS, metric_rows, write_evaluation
from jaxmm.cli.image_files import LOADING, LoadingOptions
from jaxmm.cli.parsing import positional
from jaxmm.compiling import use_compilation_cache
from jaxmm.config import MeshConfig
from jaxmm.evals.benchmark import ROOT, Benchmark, data_specs
from jaxmm.hosts import HostsConfig, distributed
from jaxmm.paths import user_path
from jaxmm.sharding import make_mesh
from jaxmm.terminal import print_table
from jaxmm.training.logs import duration
from jaxmm.validation import require

Models = Annotated[tuple[str, ...], *positional("MODEL...")]
HOSTS, MESH = HostsConfig(), MeshConfig()


def evaluate(
    models: Models, on: str | None = None, evaluators: str | None = None, train: str | None = None,
    shots: int | None = None, prompts: str | None = None, batch_size: int | None = None, root: str = ROOT,
    out: Path | None = None, predictions: bool = False, json: Path | None = None, html: Path | None = None,
    data_dir: str | None = None, dtype: str | None = None, loading: LoadingOptions = LOADING,
    mesh: MeshConfig = MESH, hosts: HostsConfig = HOSTS,
) -> int:
    """Evaluate models on data sets, without training.

    Without `--on`, a model is the workdir of a run: its own evaluators run again, on its held-out source.

    Args:
        models: Repositories of the hub, folders, files, or workdirs of runs.
        on: What to measure on, separated by commas: sources (folder:DIR, coco:FILE.json, wds:DIR:test, ...), data sets
            of CLIP_benchmark (cifar10, flickr30k), or its collections (vtab, vtab+, retrieval, imagenet_robustness).
        evaluators: Some of zero_shot, accuracy, retrieval, reranking, captions, vqa, caption_choice, linear_probe, knn,
            likelihood, separated by commas. Default: all that fit the model and the source.
        train: Source that linear probe and k-NN fit on, and that VQA's answers come from.
        shots: Images per class that the linear probe is fitted on. Default: all.
        prompts: Data set of clip-benchmark, such as imagenet1k, whose class names and templates zero-shot
            classification uses. Default: those of a web dataset's own files, else the names of the classes.
        batch_size: Images or texts per batch, over all devices. Default: 256, or that of the run.
        root: Where the data sets of CLIP_benchmark are, with {} in the place of the name.
        out: Folder of the results, one JSON file for each. If it is interrupted, the same command continues.
        predictions: Write all predictions into OUT, captions and answers also in the format of the official servers.
        json: File for all results as a JSON list, in the format of CLIP_benchmark.
        html: Page with the results, and mistakes with their images.
        data_dir: Folder of prepared TFDS data sets.
        dtype: Type of parameters and activations, such as bfloat16. Default: that of the checkpoint.
        loading: How the models are read.
        mesh: Devices. Default: all, each with a copy of the model.
        hosts: Processes that work together; `out` is then a folder that all of them share.
    """
    from jaxmm.cli import user_errors

    require(models, "models", "", "one model or more")
    require("{}" in root, "root", root, "{} in the place of the name")
    require(out is not None or not predictions, "predictions", True, "--out FOLDER, too")
    use_compilation_cache()
    with distributed(hosts, out, name="out"):
        benchmark = Benchmark(
            evaluators=None if evaluators is None else tuple(name.strip() for name in evaluators.split(",")),
            train=train, shots=shots, prompts=prompts, batch_size=batch_size, data_dir=data_dir, dtype=dtype,
            mesh=make_mesh(mesh), out=out, predictions=predictions, watch=_watch, **asdict(loading))
        jobs = [(model, spec) for model in models for spec in ((None,) if on is None else data_specs(on, root))]
        results, failed, since, primary = [], 0, time.monotonic(), jax.process_index() == 0
        for number, (model, spec) in enumerate(jobs, 1):
            try:
                results += benchmark.run(model, spec)
            except user_errors("eval") as error:
                failed += 1
                print(f"error: {model}{f' on {spec}' if spec else ''}: {error}", file=sys.stderr)
            if primary and number < len(jobs):
                left = (time.monotonic() - since) / number * (len(jobs) - number)
                print(f"{number} of {len(jobs)} done, {duration(left)} left", file=sys.stderr)
        if primary and results:
            rows = [row for row, _ in results]
            print_table(("model", "data", *COLUMNS), (
                (row["model"], row["dataset"], *cells) for row in rows for cells in metric_rows(row)))
            if json is not None:
                write_atomically(user_path(json, "json"), dumps(rows, indent=1) + "\n")
            if html is not None:
                print(f"page: {write_evaluation(user_path(html, 'html'), results)}")
    return 1 if failed else 0


def _watch(batches: Iterable, total: int, description: str) -> Iterable:
    """Show the progress over batches, with the time left."""
    terminal = sys.stderr.isatty()
    return tqdm(batches, total=total, desc=description, unit=" batches", leave=False, dynamic_ncols=terminal,
                delay=1 if terminal else 30, mininterval=1 if terminal else 30, disable=jax.process_index() > 0)
