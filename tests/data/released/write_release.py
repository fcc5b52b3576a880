"""Save small examples of all that a version writes, with the numbers that it computes from them.

`python -m tests.data.released.write_release tests/data/released/VERSION` makes the new folder VERSION: the workdirs of
two runs, models in every format, an index of images, a CapFilt folder with the data set that it ends with, and
`expected.json`. A folder of a released version is never written again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxmm.capfilt.merge import merge
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import SCORES, SELECTED, Folder, begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.config import (
    CheckpointConfig,
    DataConfig,
    ImageConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from jaxmm.data.sources.registry import open_source
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import Model, load
from jaxmm.inference.search import build_index, open_index
from jaxmm.models.blip import BLIPConfig
from jaxmm.models.clip import CLIPConfig, TextConfig
from jaxmm.models.med_config import MedConfig
from jaxmm.models.vit import ViTConfig
from jaxmm.nn.transformer import TransformerConfig
from jaxmm.saved_config import from_dict
from jaxmm.sharding import named_leaves
from jaxmm.tasks.blip_pretraining import BLIPPretraining
from jaxmm.tasks.contrastive_learning import ContrastiveLearning
from jaxmm.tasks.image_captioning import Captioning
from jaxmm.tasks.image_classification import Classification
from jaxmm.training.loop import train
from tests.data import crawl
from tests.reference import random_like

TEXTS = ["a small red circle", "a large blue square", "two green stars"]
STACK = TransformerConfig(width=8, depth=2, heads=2, mlp_dim=12, eps=1e-6)
VISION = ViTConfig(transformer=STACK, image_size=8, patch=4)
IMAGE = ImageConfig(size=8, train_crop="center", flip=False)
RULE, DECODING = Rule(threshold=None, quantile=0.4), Decoding(beams=2, max_length=8)
FORMATS = {"vit": ("jaxmm", "transformers", "timm"), "clip": ("jaxmm", "transformers", "open_clip"),
           "captioner": ("jaxmm", "transformers"), "filter": ("jaxmm",)}


def run_config(**fields) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "seed": 3, "log_every": 1, "mesh": MeshConfig(data=1),
                          "checkpoint": CheckpointConfig(every=2, keep=1)} | fields)


def vit_run() -> TrainConfig:
    """A ViT on data that every version has; it goes on with the order of the data, the moments and the average."""
    return run_config(
        task=Classification(model=replace(VISION, classes=10)),
        data=DataConfig(train="digits:train", val=None, batch_size=16, image=IMAGE),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=0.0, average=0.7))


def clip_run() -> TrainConfig:
    """A CLIP whose tokenizer the run trained."""
    text = TextConfig(transformer=STACK, vocab_size=None, context_length=8, pool="eos")
    return run_config(
        task=ContrastiveLearning(model=CLIPConfig(vision=VISION, text=text, embed_dim=6)),
        data=DataConfig(train="captions:pictures/captions.jsonl", val=None, batch_size=3, image=IMAGE,
                        tokenizer=TokenizerConfig(vocab_size=60, context_length=8)),
        optimizer=OptimizerConfig(name="sgd", momentum=0.0))


def models() -> dict[str, Model]:
    """One model of each kind, with random parameters."""
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=60, context_length=8), TEXTS * 3)
    stack = replace(STACK, eps=1e-5)
    clip = CLIPConfig(vision=replace(VISION, transformer=stack, pre_norm=True, patch_bias=False), embed_dim=6,
                      text=TextConfig(transformer=stack, vocab_size=tokenizer.vocab_size, context_length=8, pool="eos",
                                      eos_id=tokenizer.eos_id))
    med = MedConfig(transformer=replace(STACK, init="normal"), positions=16, context_width=8,
                    vocab_size=tokenizer.vocab_size + 2, decode_id=tokenizer.vocab_size,
                    encode_id=tokenizer.vocab_size + 1, end_id=tokenizer.eos_id)
    tasks = {
        "vit": Classification(model=replace(VISION, classes=3)), "clip": ContrastiveLearning(model=clip),
        "captioner": Captioning(prompt="a", model=BLIPConfig(
            vision=VISION, text=replace(med, encoder=False), embed_dim=None, matching=False, temperature=None)),
        "filter": BLIPPretraining(model=BLIPConfig(vision=VISION, text=replace(med, decoder=False), embed_dim=6,
                                                   temperature=None))}
    return {name: Model(task=task, params=random_like(jax.eval_shape(task.init, jax.random.key(0))),
                        preprocessing=IMAGE, tokenizer=None if name == "vit" else tokenizer,
                        labels=("ant", "bee", "cat") if name == "vit" else None) for name, task in tasks.items()}


def pictures(count: int = 3) -> list[np.ndarray]:
    y, x = np.mgrid[:10, :12]
    return [np.stack([20 * x, 25 * y, 40 * number + 0 * x], -1).astype(np.uint8) for number in range(count)]


def contents(model: Model) -> dict:
    """What is equal bit for bit: a digest of all parameters' paths, types, shapes and values, labels, token ids."""
    state = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(named_leaves(model.params)):
        value = np.asarray(leaf)
        state.update(f"{name} {value.dtype} {list(value.shape)} ".encode() + value.tobytes())
    return {"params": state.hexdigest(), "labels": model.labels and list(model.labels),
            "tokens": model.tokenizer and model.tokenize(TEXTS)[:, :7].tolist()}


def numbers(model: Model) -> dict[str, list]:
    """What a model computes for the pictures and texts."""
    if model.task.writes_captions:
        chosen = model.caption(pictures(), choices=TEXTS, top=3)
        return {"caption": [[score for _, score in sorted(row)] for row in chosen]}
    if model.task.classifier is not None:
        return {"image": model.encode_image(pictures()).tolist(), "classify": [
            [score for _, score in sorted(row)] for row in model.classify(pictures(), top=10)]}
    return {"image": model.encode_image(pictures()).tolist(), "text": model.encode_text(TEXTS).tolist()} | (
        {} if model.task.matcher is None else {"match": model.match(pictures(), TEXTS).tolist()})


def continued(workdir: Path) -> list[float]:
    """Go on with a run for two steps, and return their losses."""
    config = from_dict(json.loads((workdir / "config.json").read_text())["config"])
    train(replace(config, steps=config.steps + 2), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if line["step"] > config.steps]


def index_numbers(folder: Path) -> list[list]:
    """The images nearest to a vector, of the index in `folder`."""
    query = np.arange(1, 7, dtype=np.float32)
    return [[found.path, found.score] for found in open_index(folder).search(query / np.linalg.norm(query), top=3)]


def data_set_records(folder: Path) -> list[list]:
    """Keys, texts and images of the records of a data set."""
    source = open_source(f"tfds:{folder}:web")
    return [[record["key"], list(record["texts"]), hashlib.sha256(record["image"]).hexdigest()]
            for record in (source[index] for index in range(len(source)))]


def bootstrap(out: Path) -> tuple[Folder, tuple[int, ...]]:
    """Run all stages of CapFilt, with relative paths; return the folder and the number of shards that each wrote."""
    folder = begin(out, "tars:crawl.tar", None)
    written = (write_captions(folder, ["models/captioner.jaxmm"], CaptionOptions(decoding=DECODING)),
               write_scores(folder, "models/filter.jaxmm"), select(folder, RULE))
    merge(folder)
    return folder, written


def capfilt_numbers(folder: Folder) -> dict[str, list]:
    """Texts, scores and the choice of a CapFilt folder."""
    scores, selected = folder.tables(SCORES), folder.tables(SELECTED)
    return {"text": [text for table in scores for text in table.columns["text"]],
            "itm": [float(score) for table in scores for score in table.columns["itm"]],
            "kept": [bool(kept) for table in selected for kept in table.columns["kept"]]}


def write(out: Path) -> None:
    """Write everything into the new folder `out`."""
    out.mkdir(parents=True)
    with contextlib.chdir(out):
        Path("pictures").mkdir()
        for number, picture in enumerate(pictures()):
            Image.fromarray(picture).save(f"pictures/{number}.png")
        Path("pictures/captions.jsonl").write_text("".join(
            json.dumps({"image": f"{number}.png", "caption": text}) + "\n" for number, text in enumerate(TEXTS)))
        crawl.write_tar(Path("crawl.tar"), crawl.pairs(0, 2))
        expected = {"version": importlib.metadata.version("jaxmm")}
        for name, config in (("vit_run", vit_run()), ("clip_run", clip_run())):
            train(config, name)
            shutil.rmtree(f"{name}/tensorboard")
            for path in ("report.html", ".lock"):
                Path(name, path).unlink(missing_ok=True)
            expected[name] = contents(load(name)) | numbers(load(name))
        shutil.copytree("vit_run", "again")
        expected["continued"] = continued(Path("again"))
        shutil.rmtree("again")
        made = models()
        for name, model in made.items():
            for format in FORMATS[name]:
                model.save(f"models/{name}.{format}", format=format)
            expected[name] = contents(model) | numbers(model)
        vectors = made["clip"].encode_image(pictures(5))
        build_index(lambda paths, on_error: vectors, "models/clip.jaxmm", [f"/pictures/{i}.png" for i in range(5)],
                    "index", on_error=lambda path, error: None)
        expected["index"] = index_numbers(Path("index"))
        expected["capfilt"] = capfilt_numbers(bootstrap(Path("capfilt"))[0])
        expected["data_set"] = data_set_records(Path("capfilt/merged"))
        Path("capfilt/report.html").unlink(missing_ok=True)
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
