"""Our evaluation of a web dataset that clip_benchmark wrote against clip_benchmark's own, for an open_clip model at
random weights."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jaxmm.evals.evaluation import evaluate
from jaxmm.inference.model import load
from tests.evals.conftest import foil_records
from tests.parity.test_published import shaken

pytestmark = pytest.mark.parity
SIDE, LENGTH, COUNT = 24, 16, 61
CLASSES = ("ant", "honey_bee", "an elk", "red fox", "sea lion", "owl", "eel")
TEMPLATES = ("a photo of a {c}.", "{c}, a kind of animal")
VISION = {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
TOWERS = {"embed_dim": 32, "vision_cfg": VISION,
          "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2}}
SHOWN = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest",
         "size": SIDE}


def image(rng):
    """Return a smooth image of its own colours, as PNG."""
    coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((40 + int(rng.integers(9)), 31), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def models(tmp_path):
    """An open_clip model with its transform and tokenizer, and the same model as ours."""
    open_clip = pytest.importorskip("open_clip", reason="no extra names open_clip, as timm")
    theirs, _ = shaken(open_clip.CLIP(**TOWERS))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": SHOWN}))
    words = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    return SimpleNamespace(
        theirs=theirs, transform=open_clip.image_transform(SIDE, is_train=False, mean=SHOWN["mean"], std=SHOWN["std"]),
        tokenizer=open_clip.SimpleTokenizer(context_length=LENGTH), ours=load(tmp_path, tokenizer=words))


@pytest.fixture
def webdataset_builder(monkeypatch):
    """clip_benchmark's writer, without processes."""
    builder = pytest.importorskip("clip_benchmark.webdataset_builder", reason="no extra names clip-benchmark")
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(builder.torch.utils.data, "DataLoader",
                        lambda data, num_workers=0, **options: loader(data, **options))
    return builder


class Pairs(list):
    """A list of examples with the attributes that clip_benchmark's writer looks for."""

    classes, templates = CLASSES, TEMPLATES


def dataset(folder, transform):
    from clip_benchmark.datasets.builder import build_wds_dataset

    data = build_wds_dataset("own", transform, split="test", data_dir=str(folder))
    return torch.utils.data.DataLoader(data.batched(16), batch_size=None), data


def accuracy(output, target, topk):
    """Return what clip_benchmark's function does, which NumPy 2.4 refuses: it converts arrays of one number."""
    return [float(output.topk(k)[1].eq(target[:, None]).sum()) / len(target) for k in topk]


def test_zero_shot(models, webdataset_builder, tmp_path, record_property, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)

    rng = np.random.default_rng(0)
    examples = Pairs((image(rng), int(rng.integers(len(CLASSES)))) for _ in range(COUNT))
    webdataset_builder.convert_dataset(examples, "test", str(tmp_path / "data"), max_count=25, image_format="png",
                                       verbose=False)
    loader, data = dataset(tmp_path / "data", models.transform)
    loader.dataset.classes = data.classes
    want = zeroshot_classification.evaluate(models.theirs, loader, models.tokenizer, data.classes, data.templates,
                                            "cpu", amp=False)
    [result] = evaluate(models.ours, f"wds:{tmp_path / 'data'}")
    assert result.evaluator == "zero_shot" and result.records == COUNT
    assert result.metrics == {"zero_shot_top1": want["acc1"], "zero_shot_top5": want["acc5"],
                              "zero_shot_mean_recall": want["mean_per_class_recall"]}
    assert 0 < want["acc1"] < want["acc5"] < 1
    record_property("clip_benchmark, zero-shot top-1, top-5, mean recall", list(want.values()))


def test_several_labels_per_image(models, webdataset_builder, tmp_path, record_property):
    from clip_benchmark.metrics import zeroshot_classification

    rng = np.random.default_rng(3)
    examples = Pairs((image(rng), torch.tensor(rng.random(len(CLASSES)) < 0.4).float()) for _ in range(COUNT))
    webdataset_builder.convert_dataset(examples, "test", str(tmp_path / "data"), max_count=25, image_format="png",
                                       multilabel=True, verbose=False)
    loader, data = dataset(tmp_path / "data", models.transform)
    want = zeroshot_classification.evaluate(models.theirs, loader, models.tokenizer, data.classes, data.templates,
                                            "cpu", amp=False)
    [result] = evaluate(models.ours, f"wds:{tmp_path / 'data'}")
    assert result.metrics == {"zero_shot_map": pytest.approx(want["mean_average_precision"], abs=1e-6)}   # theirs: fp32
    assert 0 < want["mean_average_precision"] < 1
    record_property("clip_benchmark, mean average precision", want)


def test_retrieval(models, webdataset_builder, tmp_path, record_property):
    from clip_benchmark.metrics import zeroshot_retrieval

    rng = np.random.default_rng(1)
    words = ["red", "blue", "green", "small", "large", "round", "cat", "dog", "fox", "owl", "sofa", "tree"]
    examples = Pairs((image(rng), [f"a {' '.join(rng.choice(words, 3))} number {row} {text}"
                                   for text in range(1 + row % 3)]) for row in range(COUNT))
    webdataset_builder.convert_retrieval_dataset(examples, "test", str(tmp_path / "data"), max_count=25,
                                                 image_format="png", verbose=False)
    loader, _ = dataset(tmp_path / "data", models.transform)
    want = zeroshot_retrieval.evaluate(models.theirs, loader, models.tokenizer, "cpu", amp=False,
                                       recall_k_list=[1, 5, 10])
    [result] = evaluate(models.ours, f"wds:{tmp_path / 'data'}:test")
    assert result.evaluator == "retrieval"
    names = {"i2t": "text_retrieval_recall", "t2i": "image_retrieval_recall"}
    assert result.metrics == {f"{ours}_recall@{k}": pytest.approx(want[f"{theirs}@{k}"], abs=1e-7)    # theirs are fp32
                              for ours, theirs in names.items() for k in (1, 5, 10)}
    assert 0 < want["text_retrieval_recall@1"] < want["text_retrieval_recall@10"] < 1
    record_property("clip_benchmark, retrieval", {name: round(value, 4) for name, value in want.items()})


@torch.no_grad()
def test_caption_choice(models, tmp_path, record_property):
    selection = pytest.importorskip("clip_benchmark.metrics.image_caption_selection",
                                    reason="no extra names clip-benchmark")
    rng = np.random.default_rng(2)
    (tmp_path / "images").mkdir()
    for number in range(24):
        (tmp_path / "images" / f"{number}.png").write_bytes(image(rng))
    pixels = torch.stack([models.transform(Image.open(tmp_path / "images" / f"{number}.png")) for number in range(24)])
    texts = [f"a {left} on a {right}" for left in ("cat", "dog", "fox", "owl") for right in
             ("sofa", "tree", "red chair", "lion", "car", "blue moon")]
    embedded = (models.theirs.encode_image(pixels, normalize=True).numpy(),
                models.theirs.encode_text(models.tokenizer(texts), normalize=True).numpy())
    rows = [{"image_0": str(left), "image_1": str(right), "caption_0": texts[one], "caption_1": texts[other]}
            for left, right, one, other in foil_records(*embedded, count=5)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = [(pixels[[int(row["image_0"]), int(row["image_1"])]][None], [[row["caption_0"], row["caption_1"]]])
               for row in rows]
    want = selection.evaluate(models.theirs, batches, models.tokenizer, "cpu", amp=False)
    [result] = evaluate(models.ours, f"winoground:{tmp_path / 'examples.jsonl'}")
    assert want == {"text_acc": 0.5, "image_acc": 0.5, "acc": 0.25}
    assert result.metrics == {"text_score": 0.5, "image_score": 0.5, "group_score": 0.25}
