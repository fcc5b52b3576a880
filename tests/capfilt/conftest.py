"""A small crawl, small models, and a CapFilt folder that was made of them without interruption."""

import hashlib

import pytest

from jaxmm.capfilt.merge import merge
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.stages import begin, select, write_captions, write_scores
from jaxmm.capfilt.synthetic_captions import CaptionOptions
from jaxmm.inference.generate import Decoding
from tests.data import crawl
from tests.pretrained import tiny

SAMPLED = Decoding(sample=True, top_p=0.9, max_length=9)
MEDIAN = Rule(threshold=None, quantile=0.5)


def run(out, data, models):
    folder = begin(out, f"tars:{data}/*.tar", f"captions:{data}/human.jsonl", size=4)
    written = (write_captions(folder, [str(models / "captioner")], CaptionOptions(decoding=SAMPLED, captions=2)),
               write_scores(folder, str(models / "filter")), select(folder, MEDIAN))
    merge(folder)
    return folder, written


def contents(out):
    """Return the digest of every file but the report, which names the folder."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file() and path.name != "report.html"}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.captioner().save(folder / "captioner")
    tiny.matcher().save(folder / "filter")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crawl")
    crawl.write_tar(folder / "00000.tar", crawl.pairs(0, 18))
    crawl.write_tar(folder / "00001.tar", crawl.files(crawl.CASES))
    crawl.write_tar(folder / "00002.tar", crawl.pairs(40, 3))
    lines = []
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(crawl.jpeg(70 + i))
        lines.append(f'{{"image": "{i}.jpg", "captions": ["a small circle", "picture {i}"]}}\n')
    (folder / "human.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data, models):
    """A folder of all stages, and the number of shards that each stage wrote."""
    return run(tmp_path_factory.mktemp("finished") / "out", data, models)
