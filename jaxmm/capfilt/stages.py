"""The stages over all shards: what is done stays done, a shard is whole or not there, hosts share the shards.

A folder holds `manifest.json`, `captions/`, `scores/`, `selected/` (a Parquet file a shard: `web-00000.parquet`, ...),
`merged/` (a TFDS data set) and `report.html`. Every stage may be killed and started again, on any number of hosts: what
comes out is the same bytes. Under `jax.distributed` host h of H takes every H-th shard and waits for the others at the
end of a stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from jaxmm import hosts
from jaxmm.capfilt import scoring as score
from jaxmm.capfilt import synthetic_captions as caption
from jaxmm.capfilt.manifest import NAME, agree, model_digest, read_manifest
from jaxmm.capfilt.scoring import score_shard
from jaxmm.capfilt.selection import Rule, cutoff, select_texts
from jaxmm.capfilt.synthetic_captions import NUCLEUS, caption_shard
from jaxmm.capfilt.tables import Texts, digest, file_digest, made_from, read_texts, write_texts
from jaxmm.config import ConfigError, require, to_dict
from jaxmm.data.base import Source
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import shards
from jaxmm.hosts.startup import barrier
from jaxmm.inference.generate import Decoding
from jaxmm.inference.model import load

VERSION = 1
"""Of what the stages write; another one is made anew."""
SIZE = 1000
"""Records in a shard, of a source that has none of its own."""
STAGES = CAPTIONS, SCORES, SELECTED = "captions", "scores", "selected"


@dataclass(frozen=True)
class Shard:
    """One shard of the web's pictures, or of people's."""

    name: str
    origin: str
    source: Source = field(repr=False)


@dataclass(frozen=True)
class Folder:
    """A CapFilt folder and the data that it is about."""

    path: Path
    data_dir: str | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """What it was made from. Raises `ConfigError` where nothing was begun."""
        known = read_manifest(self.path)
        require("web" in known, "out", str(self.path), "a folder that `jaxmm capfilt caption` or `run` began")
        return known

    @cached_property
    def shards(self) -> list[Shard]:
        """All of them, in order."""
        found = []
        for origin in ("web", "human"):
            if self.manifest.get(origin):
                source = open_source(self.manifest[origin], data_dir=self.data_dir)
                found += [Shard(f"{origin}-{i:05d}", origin, each)
                          for i, each in enumerate(shards(source, self.manifest["shard_records"]))]
        return found

    def table(self, stage: str, shard: Shard) -> Path:
        """The file of a shard."""
        return self.path / stage / f"{shard.name}.parquet"

    def tables(self, stage: str, columns: Sequence[str] | None = None) -> list[Texts]:
        """All of a stage. Raises `ConfigError` where some are missing."""
        self.wanted(stage)
        return [read_texts(self.table(stage, shard), columns) for shard in self.shards]

    def wanted(self, stage: str) -> None:
        """Raises `ConfigError` where a stage is not done."""
        missing = [shard.name for shard in self.shards if not self.table(stage, shard).exists()]
        require(not missing, "out", str(self.path), f"a folder with all of {stage}/: {len(missing)} of "
                f"{len(self.shards)} shards are missing, the first {', '.join(missing[:1])}")


def begin(path: Path, web: str, human: str | None, *, size: int = SIZE, data_dir: str | None = None) -> Folder:
    """A new folder, or one of the same data. Raises `ConfigError`, `DataError`."""
    require(size > 0, "shard_records", size, "a positive number")
    agree(path, version=VERSION, web=web, human=human, shard_records=size)
    barrier("begin")
    hosts.wait_for_path("out", path / NAME)
    return Folder(path, data_dir)


def write_captions(
    folder: Folder, captioners: Sequence[str], *, decoding: Decoding = NUCLEUS, captions: int = 1, seed: int = 0,
    prompt: str | None = None,
) -> int:
    """The first stage; how many shards this host wrote. `captioners` are what `jaxmm.load` takes."""
    facts = agree(folder.path, captioners=list(captioners), decoding=to_dict(decoding), captions=captions, seed=seed,
                  prompt=prompt)
    mesh, models, known = local_mesh(), [], facts.get("captioner_digests")

    def made(shard: Shard, digests: list[str]) -> str:
        written = [digests, to_dict(decoding), captions, seed, prompt] if shard.origin == "web" else []
        return digest(VERSION, shard.source.fingerprint, written)

    def load_all() -> list[str]:
        models.extend(load(name, mesh=mesh) for name in captioners)
        for name, model in zip(captioners, models, strict=True):
            caption.check_captioner(model, name, decoding, captions, prompt)
        digests = [model_digest(model) for model in models]
        agree(folder.path, captioner_digests=digests)
        return digests

    def work(shard: Shard, done) -> Texts:
        return caption_shard(shard.source, models if shard.origin == "web" else (), decoding=decoding,
                             captions=captions, seed=seed, prompt=prompt, origin=shard.origin, mesh=mesh, done=done)

    return _run(folder, CAPTIONS, made, known, load_all, work)


def write_scores(folder: Folder, filter: str) -> int:
    """The second stage; how many shards this host wrote. `filter` is what `jaxmm.load` takes."""
    folder.wanted(CAPTIONS)
    facts = agree(folder.path, filter=filter)
    mesh, models = local_mesh(), []

    def made(shard: Shard, own: str) -> str:
        return digest(VERSION, file_digest(folder.table(CAPTIONS, shard)), own)

    def load_it() -> str:
        models.append(load(filter, mesh=mesh))
        score.check_filter(models[0], filter)
        own = model_digest(models[0])
        agree(folder.path, filter_digest=own)
        return own

    def work(shard: Shard, done) -> Texts:
        return score_shard(shard.source, read_texts(folder.table(CAPTIONS, shard)), models[0], mesh=mesh, done=done)

    return _run(folder, SCORES, made, facts.get("filter_digest"), load_it, work)


def select(folder: Folder, rule: Rule) -> int:
    """The third stage, without a model; how many shards this host wrote. The rule may be another than before."""
    folder.wanted(SCORES)
    least = rule.threshold
    if rule.quantile is not None:
        least = cutoff(rule, folder.tables(SCORES, ["key", "origin", rule.score]))
    agree(folder.path, free=("rule", "least"), rule=to_dict(rule), least=least)

    def made(shard: Shard, _) -> str:
        return digest(VERSION, file_digest(folder.table(SCORES, shard)), to_dict(rule), least)

    def work(shard: Shard, done) -> Texts:
        texts = select_texts(read_texts(folder.table(SCORES, shard)), rule, least)
        done(texts.pictures)
        return texts

    return _run(folder, SELECTED, made, "no model", str, work)


def _run(folder: Folder, stage: str, made: Callable[[Shard, Any], str], known: Any, prepare: Callable[[], Any],
         work: Callable[[Shard, Callable[[int], Any]], Texts]) -> int:
    """This host's shards of a stage that are not there yet. `known` is what `prepare`, which loads the models, is
    expected to return; None: nobody knows yet."""
    mine = folder.shards[jax.process_index()::jax.process_count()]
    todo = [shard for shard in mine
            if known is None or made_from(folder.table(stage, shard)) != made(shard, known)]
    hosts.heartbeat(stage)
    if todo:
        known = prepare()
        todo = [shard for shard in todo if made_from(folder.table(stage, shard)) != made(shard, known)]
    with tqdm(total=sum(len(shard.source) for shard in todo), desc=stage, unit=" pictures", mininterval=1.0,
              dynamic_ncols=True, disable=None if todo and jax.process_index() == 0 else True) as bar:
        def done(count: int) -> None:
            hosts.heartbeat(stage)
            bar.update(count)

        for shard in todo:
            write_texts(folder.table(stage, shard), work(shard, done), made(shard, known))
    barrier(stage)
    return len(todo)


def local_mesh() -> Mesh | None:
    """This host's devices, each with its share of the pictures; None: there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    if caption.PICTURES % len(devices):
        raise ConfigError(f"this host has {len(devices)} devices; wanted a divisor of {caption.PICTURES}")
    return jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3,
                         devices=devices)

