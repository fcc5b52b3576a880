"""Run the stages over all shards: finished shards stay, and hosts share the work.

A folder has `manifest.json`, `captions/`, `scores/`, `selected/` (one Parquet file per shard: `web-00000.parquet`,
...), `merged/` (a TFDS data set) and `report.html`. Every stage may be killed and started again, on any number of
hosts, and gives the same bytes. Under `jax.distributed` host h of H takes every H-th shard, and waits for the others at
the end of a stage.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from jaxmm import hosts
from jaxmm.capfilt.image_batches import BATCH
from jaxmm.capfilt.manifest import NAME, model_digest, plain, read_manifest, record_facts
from jaxmm.capfilt.near_duplicates import group_images, representatives, unpack
from jaxmm.capfilt.scoring import make_filter, score_shard, split_name
from jaxmm.capfilt.selection import Rule, frequent_rows, limits, select_texts
from jaxmm.capfilt.synthetic_captions import DEFAULTS, CaptionOptions, Done, caption_shard, check_captioner
from jaxmm.capfilt.tables import Texts, digest, file_digest, made_from, read_texts, score_names, write_texts
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
EMBEDDINGS = "embeddings"
"""Folder of the embeddings of images, which are written with the scores."""

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


def write_scores(folder: Folder, filters: str | Sequence[str], embeddings: str | None = None) -> int:
    """Run the second stage and return how many shards this host wrote.

    `filters` are what `jaxmm.load` takes, each as NAME=MODEL or, at most one of them, without a name. `embeddings` is
    the name of a cosine: the embeddings of its images are written too, to find near-duplicates.
    """
    folder.require_stage(CAPTIONS)
    specs = [filters] if isinstance(filters, str) else list(filters)
    names = [split_name(spec)[0] for spec in specs]
    require(specs and len(set(names)) == len(names), "filter", tuple(specs), "one or more, with different names")
    facts = record_facts(folder.path, filter=specs[0] if len(specs) == 1 else specs)
    mesh, models, known = local_mesh(), [], []

    def digest_of(shard: Shard, filter_digest: str) -> str:
        stored = [] if embeddings is None else [embeddings]
        return digest(VERSION, file_digest(folder.table(CAPTIONS, shard)), filter_digest, *stored)

    def load_models() -> str:
        models.extend(make_filter(load(split_name(spec)[1], mesh=mesh), spec) for spec in specs)
        cosines = [one.cosine for one in models if one.cosine is not None]
        require(embeddings is None or embeddings in cosines, "embeddings", embeddings,
                f"one of the cosines {', '.join(cosines) or '(there is none)'}")
        digests = [model_digest(one.model) for one in models]
        known.append(digests[0] if len(digests) == 1 else digest(*digests))
        record_facts(folder.path, free=("embeddings",), filter_digest=known[0],
                     **({"embeddings": embeddings} if embeddings or facts.get("embeddings") else {}))
        return known[0]

    def write(shard: Shard, done: Done) -> Texts:
        texts = read_texts(folder.table(CAPTIONS, shard))
        texts, embedded = score_shard(shard.source, texts, models, embeddings=embeddings, mesh=mesh, done=done)
        if embedded is not None:  # before the scores, which make the shard complete
            write_texts(folder.table(EMBEDDINGS, shard), embedded, digest_of(shard, known[0]))
        return texts

    return _run_stage(folder, SCORES, digest_of, facts.get("filter_digest"), load_models, write)


def select(folder: Folder, rule: Rule) -> int:
    """Run the third stage, without a model, and return how many shards this host wrote. The rule may be a new one."""
    folder.require_stage(SCORES)
    names = score_names(read_texts(folder.table(SCORES, folder.shards[0])).columns)
    rule.check(names)
    reads_all = rule.quantile is not None or rule.formula is not None
    known = limits(rule, folder.tables(SCORES, ["key", "origin", *names]) if reads_all else (), names)
    near = find_near_duplicates(folder, rule)
    record_facts(folder.path, free=("rule", "least"), rule=plain(rule), least=known.least)

    def selected(shard: Shard, frequent: Sequence[int] = ()) -> Texts:
        texts, places = read_texts(folder.table(SCORES, shard)), near.get(shard.name)
        if places is None:
            return select_texts(texts, rule, known, frequent=frequent)
        firsts = [places[record] for record in texts.columns["record"]]
        dropped = shard.origin == "web" or rule.group
        near_duplicate = np.array([dropped and first is not None for first in firsts], bool)
        texts = replace(texts, columns={**texts.columns, "near_duplicate": near_duplicate})
        if not rule.group:
            return select_texts(texts, rule, known, near_duplicate, frequent)
        ids = [own if first is None else first for own, first in zip(texts.columns["image_id"], firsts, strict=True)]
        return select_texts(replace(texts, columns={**texts.columns, "image_id": ids}), rule, known, frequent=frequent)

    frequent: dict[str, list[int]] = {}
    if rule.repeats is not None:
        rows = frequent_rows([selected(shard) for shard in folder.shards], rule)
        frequent = {shard.name: numbers for shard, numbers in zip(folder.shards, rows, strict=True)}

    def digest_of(shard: Shard, _) -> str:
        more = [part for part in (sorted([*key, value] for key, value in known.quantiles.items()),
                                  [[record, first] for record, first in near.get(shard.name, {}).items()],
                                  frequent.get(shard.name, [])) if part]
        return digest(VERSION, file_digest(folder.table(SCORES, shard)), plain(rule), known.least, *more)

    def write(shard: Shard, done: Done) -> Texts:
        texts = selected(shard, frequent.get(shard.name, ()))
        done(texts.images)
        return texts

    return _run_stage(folder, SELECTED, digest_of, "no model", str, write)


def find_near_duplicates(folder: Folder, rule: Rule) -> dict[str, dict[int, str | None]]:
    """Return, by shard and record, the `image_id` of the image that an image is nearly the same as; None if there is
    none, or if it is the first of them. {} if the rule asks for none.

    The first image of a group is one with human captions, if there is one.
    """
    if rule.near_duplicates is None:
        return {}
    require(folder.manifest.get("embeddings"), "rule.near_duplicates", rule.near_duplicates,
            "None, or a folder that was scored with `--embeddings NAME`, the name of a cosine")
    tables = folder.tables(EMBEDDINGS)
    groups = group_images(unpack([table.columns["embedding"] for table in tables]), rule.near_duplicates)
    origins = np.repeat([shard.origin == "human" for shard in folder.shards], [len(table) for table in tables])
    first = representatives(groups, origins)
    ids = [image_id for table in tables for image_id in table.columns["image_id"]]
    nearest: dict[str, dict[int, str | None]] = {}
    place = itertools.count()
    for shard, table in zip(folder.shards, tables, strict=True):
        nearest[shard.name] = {record: None if first[i] == i else ids[first[i]]
                               for record, i in zip(table.columns["record"], place, strict=False)}
    return nearest


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
