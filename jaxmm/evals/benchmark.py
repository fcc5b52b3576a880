"""Evaluate models on data sets: names of data sets and collections, results as JSON, and which of them exist."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmm.atomic import write_atomically
from jaxmm.config import Evaluator
from jaxmm.data.base import Source
from jaxmm.data.sources.registry import open_source
from jaxmm.evals.context import EvalContext
from jaxmm.evals.evaluation import Result, check_unused, choose, measure, model_context, run_context
from jaxmm.evals.named_prompts import named_prompts
from jaxmm.evals.published_scores import data_set_name
from jaxmm.inference.model import Model, load
from jaxmm.paths import is_bucket, user_path
from jaxmm.pretrained.io.files import Weights
from jaxmm.pretrained.registry import open_checkpoint
from jaxmm.saved_config import to_dict

ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{}"
"""Where CLIP_benchmark's data sets are, with `{}` in the place of the name."""
_VTAB = ("caltech101", "cifar100", "clevr_count_all", "clevr_closest_object_distance", "diabetic_retinopathy", "dmlab",
         "dsprites_label_orientation", "dsprites_label_x_position", "dtd", "eurosat", "kitti_closest_vehicle_distance",
         "flowers", "pets", "pcam", "resisc45", "smallnorb_label_azimuth", "smallnorb_label_elevation", "svhn")
_ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
COLLECTIONS: dict[str, tuple[str, ...]] = {
    "vtab": (*(f"vtab/{name}" for name in _VTAB), "sun397"),
    "vtab+": ("imagenet1k", *_ROBUSTNESS, "fer2013", "voc2007", "voc2007_multilabel", "sun397", "cars",
              "fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211", "renderedsst2", "vtab/cifar10",
              *(f"vtab/{name}" for name in _VTAB)),
    "imagenet_robustness": _ROBUSTNESS,
    "retrieval": ("mscoco_captions", "flickr8k", "flickr30k"),
}
"""CLIP_benchmark's collections."""
TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval", "linear_probe": "linear_probe",
         "captions": "captioning", "caption_choice": "image_caption_selection"}
"""CLIP_benchmark's names of our evaluators."""
_METRICS = ((r"zero_shot_top", "acc"), (r"zero_shot_mean_recall", "mean_per_class_recall"),
            (r"zero_shot_map", "mean_average_precision"), (r"probe_top", "lp_acc"),
            (r"probe_mean_recall", "lp_mean_per_class_recall"), (r"i2t_recall", "text_retrieval_recall"),
            (r"t2i_recall", "image_retrieval_recall"), (r"text_score", "text_acc"), (r"image_score", "image_acc"),
            (r"group_score", "acc"))


def data_specs(on: str, root: str = ROOT) -> list[str]:
    """Return the specs that `on` names, separated by commas: specs, collections, or data sets of CLIP_benchmark."""
    specs: list[str] = []
    for name in re.split(r",(?=\s*(?:[a-z]+:|(?:vtab/)?[\w+-]+\s*(?:,|$)))", on):
        name = name.strip()
        specs += [name] if ":" in name else [f"wds:{root.format(one.replace('/', '-'))}:test"
                                             for one in COLLECTIONS.get(name, (name,))]
    return list(dict.fromkeys(specs))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Settings of an evaluation of several models on several data sets."""

    evaluators: tuple[str, ...] | None = None
    """Names in `EVALUATORS`; None: all that fit."""
    train: str | None = None
    shots: int | None = None
    prompts: str | None = None
    """Data set of clip-benchmark whose class names and templates zero-shot classification uses."""
    batch_size: int | None = None
    data_dir: str | None = None
    mesh: Mesh | None = None
    dtype: str | None = None
    architecture: str | None = None
    weights: Weights | None = None
    out: Path | None = None
    """Folder of the results; what is there already, with the same settings, is not measured again."""
    predictions: bool = False
    """Write all predictions into `out`."""
    watch: Callable[..., Any] | None = None
    """Shows progress: (batches, their number, description) to batches."""
    _loaded: dict[str, Model] = field(default_factory=dict, repr=False)
    """The model that was loaded last."""
    _described: dict[str, Model] = field(default_factory=dict, repr=False)
    """The models so far, without their parameters."""

    def run(self, model: str, spec: str | None) -> Iterator[tuple[dict[str, Any], Source]]:
        """Yield the result of every evaluator of `model` on `spec`, as JSON, and the source.

        Without `spec`, the model is the workdir of a run, and its own evaluators run on its held-out source.
        """
        if spec is None:
            check_unused(evaluators=self.evaluators, train=self.train, shots=self.shots, prompts=self.prompts,
                         batch_size=self.batch_size, dtype=self.dtype, architecture=self.architecture,
                         weights=self.weights)
            run, evaluators = run_context(model, self.mesh, self.data_dir)
        else:
            run, evaluators = None, None
            source = open_source(spec, data_dir=self.data_dir)
            train = None if self.train is None else open_source(self.train, data_dir=self.data_dir)
            context = model_context(self._describe(model), source, train, self.data_dir)
            prompts = (None, None) if self.prompts is None else named_prompts(self.prompts)
            evaluators = choose(context, self.evaluators, shots=self.shots, classes=prompts[0], templates=prompts[1],
                                batch_size=self.batch_size)
        for evaluator in evaluators:
            chosen = run or context
            measured_on = chosen.source_of(evaluator)
            settings = self._settings(model, evaluator, measured_on, chosen)
            file = None if self.out is None else self.out / f"{_file_name(model, measured_on.name, evaluator)}.json"
            row = None if file is None else _read(file, settings)
            if row is None:
                if run is None:
                    chosen = replace(context, params=self._load(model).params)
                if self.watch is not None:
                    described = f"{_short(model)} on {measured_on.name}"
                    chosen = replace(chosen, watch=lambda batches, total, described=described: self.watch(
                        batches, total, described))
                result = measure(chosen, self._with_results(evaluator, file), self.predictions)
                row = json.loads(json.dumps(as_json(model, result, settings)))
                if file is not None and jax.process_index() == 0:
                    self._write(file, row, result)
            yield row, measured_on

    def _describe(self, model: str) -> Model:
        """Return `model` without parameters, which are not read if all results are there."""
        if model not in self._described:
            opened = open_checkpoint(model, architecture=self.architecture, weights=self.weights)
            self._described[model] = Model(task=opened.task, params=None, preprocessing=opened.image,
                                           tokenizer=opened.tokenizer, labels=opened.labels, mesh=self.mesh)
        return self._described[model]

    def _load(self, model: str) -> Model:
        if model not in self._loaded:
            self._loaded.clear()
            self._loaded[model] = load(model, mesh=self.mesh, dtype=self.dtype, architecture=self.architecture,
                                       weights=self.weights)
        return self._loaded[model]

    def _settings(self, model: str, evaluator: Evaluator, source: Source, context: EvalContext) -> dict[str, Any]:
        """Return all that the result depends on, as JSON."""
        return json.loads(json.dumps({
            "model": model, "files": hashlib.blake2b(json.dumps(_stamp(model)).encode(), digest_size=8).hexdigest(),
            "dtype": self.dtype, "architecture": self.architecture, "weights": self.weights,
            "source": source.name, "fingerprint": source.fingerprint,
            "train": context.train and [context.train.name, context.train.fingerprint],
            "predictions": self.predictions, "image": to_dict(context.data.image), "evaluator": to_dict(evaluator)}))

    def _with_results(self, evaluator: Evaluator, file: Path | None) -> Evaluator:
        """Return `evaluator`; if it can write its predictions in the format of a server, it does so beside `file`."""
        if file is None or not self.predictions or "results" not in {one.name for one in fields(evaluator)}:
            return evaluator
        return replace(evaluator, results=str(_beside(file, "results.json")))

    def _write(self, file: Path, row: dict[str, Any], result: Result) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.predictions:
            predictions = _beside(file, "jsonl")
            predictions.parent.mkdir(exist_ok=True)
            write_atomically(predictions, "".join(
                json.dumps({"key": key, "expected": expected, "predicted": predicted}) + "\n"
                for key, expected, predicted in result.predictions))
        write_atomically(file, json.dumps(row, indent=1) + "\n")


def _stamp(model: str) -> list[list]:
    """Return names, sizes and times of the files of a model; [] for one of the hub."""
    path = user_path(model)
    files = path.files() if is_bucket(path) else [path] if path.is_file() else sorted(path.rglob("*"))
    weights = (file for file in files if file.suffix in (".json", ".safetensors", ".bin", ".pt", ".pth", ".npz")
               or "checkpoints" in file.parts)
    return [[file.name, status.st_size, status.st_mtime_ns] for file in weights if is_bucket(file) or file.is_file()
            for status in [file.stat()]]


def as_json(model: str, result: Result, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a result in CLIP_benchmark's format, with all of ours under `jaxmm`."""
    location = result.source.partition(":")[2]
    name = re.sub(r":\w+$", "", location).rstrip("/").rpartition("/")[2].removeprefix("wds_").replace("vtab-", "vtab/")
    return {"dataset": f"wds/{name}" if result.source.startswith("wds:") else result.source,
            "model": _short(model), "pretrained": model, "task": TASKS.get(result.evaluator, result.evaluator),
            "metrics": {_metric(name): value for name, value in result.metrics.items() if value == value},
            "language": "en",
            "jaxmm": asdict(replace(result, predictions=())) | {"settings": settings}}


def _metric(name: str) -> str:
    """Return CLIP_benchmark's name of a metric."""
    for ours, theirs in _METRICS:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result in `file` if it was measured with `settings`."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        return row if row["jaxmm"]["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _beside(file: Path, ending: str) -> Path:
    """Return a file in the folder of predictions: in that of the results, clip_benchmark reads every JSON file."""
    return file.parent / "predictions" / f"{file.stem}.{ending}"


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _file_name(model: str, source: str, evaluator: Evaluator) -> str:
    """Return a name that differs for different models, sources, evaluators and prefixes."""
    kind = re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", type(evaluator).__name__).lower()
    digest = hashlib.blake2b(json.dumps([model, source, evaluator.prefix]).encode(), digest_size=3).hexdigest()
    parts = (_short(model), data_set_name(source), kind, digest)
    return "_".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in parts)
