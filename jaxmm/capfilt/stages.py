"""Run the stages over all shards: finished shards stay, and hosts share the work.

A folder has `manifest.json`, `captions/`, `scores/`, `selected/` (one Parquet file per shard: `web-00000.parquet`,
...), `merged/` (a TFDS data set) and `report.html`. Every stage may be killed and started again, on any number of
hosts, and gives the same bytes. Under `jax.distributed` host h of H takes every H-th shard, and waits for the others at
the end of a stage.
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
from jaxmm.capfilt.image_batches import BATCH
from jaxmm.capfilt.manifest import NAME, model_digest, plain, read_manifest, record_facts
from jaxmm.capfilt.scoring import check_filter, score_shard
from jaxmm.capfilt.selection import Rule, cutoff, select_texts
from jaxmm.capfilt.synthetic_captions import DEFAULTS, CaptionOptions, Done, caption_shard, check_captioner
from jaxmm.capfilt.tables import Texts, digest, file_digest, made_from, read_texts, write_texts
from jaxmm.data.base import Source
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.shards import shards
from jaxmm.hosts.startup import barrier
from jaxmm.inference.model import load
from jaxmm.paths import user_path
from jaxmm.validation import ConfigError, require

VERSION = 1
"""Version of what the stages write; shards of another version are written again."""
SHARD_RECORDS = 1000
"""Records per shard, if the source has no shards of its own."""
STAGES = CAPTIONS, SCORES, SELECTED = "captions", "scores", "selected"

@dataclass(frozen=True)
class Shard:
    """A shard of the web's images, or of those with human captions."""

    name: str
    origin: str
    source: Source = field(repr=False)


@dataclass(frozen=True)
class Folder:
    """A CapFilt folder and its data."""

    path: Path
    data_dir: str | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """Facts recorded so far. Raises `ConfigError` if there is no run in this folder."""
        facts = read_manifest(self.path)
        require("web" in facts, "out", str(self.path), "a folder that `jaxmm capfilt caption` or `run` began")
        return facts

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards, in order."""
        parts = []
        for origin in ("web", "human"):
            if self.manifest.get(origin):
                source = open_source(self.manifest[origin], data_dir=self.data_dir)
                parts += [Shard(f"{origin}-{i:05d}", origin, part)
                          for i, part in enumerate(shards(source, self.manifest["shard_records"]))]
        return parts

    def table(self, stage: str, shard: Shard) -> Path:
        """Return the file of a shard."""
        return self.path / stage / f"{shard.name}.parquet"

    def tables(self, stage: str, columns: Sequence[str] | None = None) -> list[Texts]:
        """Read all files of a stage. Raise `ConfigError` if some are missing."""
        self.require_stage(stage)
        return [read_texts(self.table(stage, shard), columns) for shard in self.shards]

    def require_stage(self, stage: str) -> None:
        """Raise `ConfigError` if a stage is not finished."""
        missing = [shard.name for shard in self.shards if not self.table(stage, shard).exists()]
        require(not missing, "out", str(self.path), f"a folder with all of {stage}/: {len(missing)} of "
                f"{len(self.shards)} shards are missing, the first {', '.join(missing[:1])}")


def begin(
    path: Path | str, web: str, human: str | None, *, size: int = SHARD_RECORDS, data_dir: str | None = None
) -> Folder:
    """Return a new folder, or one of the same data. Raise `ConfigError` or `DataError`."""
    require(size > 0, "shard_records", size, "a positive number")
    path = user_path(path, "out")
    record_facts(path, version=VERSION, web=web, human=human, shard_records=size)
    barrier("begin")
    hosts.wait_for_path("out", path / NAME)
    return Folder(path, data_dir)


def write_captions(folder: Folder, captioners: Sequence[str], options: CaptionOptions = DEFAULTS) -> int:
    """Run the first stage and return how many shards this host wrote. `captioners` are what `jaxmm.load` takes."""
    decoding = plain(options.decoding)
    facts = record_facts(folder.path, captioners=list(captioners), decoding=decoding, captions=options.captions,
                         seed=options.seed, prompt=options.prompt)
    mesh, models = local_mesh(), []

    def digest_of(shard: Shard, digests: list[str]) -> str:
        generated = [digests, decoding, options.captions, options.seed, options.prompt] if shard.origin == "web" else []
        return digest(VERSION, shard.source.fingerprint, generated)

    def load_models() -> list[str]:
        models.extend(load(name, mesh=mesh) for name in captioners)
        for name, model in zip(captioners, models, strict=True):
            check_captioner(model, name, options)
        digests = [model_digest(model) for model in models]
        record_facts(folder.path, captioner_digests=digests)
        return digests

    def write(shard: Shard, done: Done) -> Texts:
        return caption_shard(shard.source, models if shard.origin == "web" else (), options, origin=shard.origin,
                             mesh=mesh, done=done)

    return _run_stage(folder, CAPTIONS, digest_of, facts.get("captioner_digests"), load_models, write)


def write_scores(folder: Folder, filter: str) -> int:
    """Run the second stage and return how many shards this host wrote. `filter` is what `jaxmm.load` takes."""
    folder.require_stage(CAPTIONS)
    facts = record_facts(folder.path, filter=filter)
    mesh, models = local_mesh(), []

    def digest_of(shard: Shard, filter_digest: str) -> str:
        return digest(VERSION, file_digest(folder.table(CAPTIONS, shard)), filter_digest)

    def load_model() -> str:
        models.append(load(filter, mesh=mesh))
        check_filter(models[0], filter)
        filter_digest = model_digest(models[0])
        record_facts(folder.path, filter_digest=filter_digest)
        return filter_digest

    def write(shard: Shard, done: Done) -> Texts:
        return score_shard(shard.source, read_texts(folder.table(CAPTIONS, shard)), models[0], mesh=mesh, done=done)

    return _run_stage(folder, SCORES, digest_of, facts.get("filter_digest"), load_model, write)


def select(folder: Folder, rule: Rule) -> int:
    """Run the third stage, without a model, and return how many shards this host wrote. The rule may be a new one."""
    folder.require_stage(SCORES)
    least = rule.threshold
    if rule.quantile is not None:
        least = cutoff(rule, folder.tables(SCORES, ["key", "origin", rule.score]))
    record_facts(folder.path, free=("rule", "least"), rule=plain(rule), least=least)

    def digest_of(shard: Shard, _) -> str:
        return digest(VERSION, file_digest(folder.table(SCORES, shard)), plain(rule), least)

    def write(shard: Shard, done: Done) -> Texts:
        texts = select_texts(read_texts(folder.table(SCORES, shard)), rule, least)
        done(texts.images)
        return texts

    return _run_stage(folder, SELECTED, digest_of, "no model", str, write)


def _run_stage(folder: Folder, stage: str, digest_of: Callable[[Shard, Any], str], known: Any,
               load_models: Callable[[], Any], write: Callable[[Shard, Done], Texts]) -> int:
    """Write this host's shards of a stage that are not finished.

    A shard is finished if its file was made from `digest_of` the shard and the digests of the models. `known` are the
    digests of an earlier run, or None. `load_models` is called if there is work, and returns the digests of now.
    """
    own = folder.shards[jax.process_index()::jax.process_count()]
    todo = [shard for shard in own
            if known is None or made_from(folder.table(stage, shard)) != digest_of(shard, known)]
    hosts.heartbeat(stage)
    if todo:
        known = load_models()
        todo = [shard for shard in todo if made_from(folder.table(stage, shard)) != digest_of(shard, known)]
    with progress_bar(stage, todo) as bar:
        def done(count: int) -> None:
            hosts.heartbeat(stage)
            bar.update(count)

        for shard in todo:
            write_texts(folder.table(stage, shard), write(shard, done), digest_of(shard, known))
    barrier(stage)
    return len(todo)


def progress_bar(name: str, todo: Sequence[Shard]) -> tqdm:
    """Return a progress bar over the images of the shards `todo`, which only the first host shows."""
    return tqdm(total=sum(len(shard.source) for shard in todo), desc=name, unit=" images", mininterval=1.0,
                dynamic_ncols=True, disable=None if todo and jax.process_index() == 0 else True)


def local_mesh() -> Mesh | None:
    """Return a mesh of this host's devices, over which batches are cut; None if there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    if BATCH % len(devices):
        raise ConfigError(f"this host has {len(devices)} devices; expected a divisor of {BATCH}")
    return jax.make_mesh((len(devices), 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3,
                         devices=devices)
