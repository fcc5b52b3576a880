"""`jaxmm capfilt`: better captions for a crawl, stage by stage or all at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from jaxmm.capfilt import bootstrap as bootstraps
from jaxmm.capfilt import html_report as reports
from jaxmm.capfilt import stages
from jaxmm.capfilt.merge import merge as merge_kept
from jaxmm.capfilt.merge import merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.synthetic_captions import NUCLEUS
from jaxmm.config import require
from jaxmm.hosts.startup import HostsConfig, distributed
from jaxmm.inference.generate import Decoding
from jaxmm.recipes import parse_recipe
from jaxmm.terminal import print_json, print_table

Flat = Annotated[Rule, tyro.conf.arg(name="")]
Names = tuple[str, ...]
KEPT = Rule()
HERE = HostsConfig()


def run(
    captioner: Names, filter: str, web: str, out: Path, human: str | None = None, captions: int = 1,
    decoding: Decoding = NUCLEUS, prompt: str | None = None, seed: int = 0, rule: Flat = KEPT, human_weight: int = 1,
    shard_records: int = stages.SIZE, data_dir: str | None = None, hosts: HostsConfig = HERE,
) -> None:
    """Captions, scores, selects and merges, and writes the report. Interrupted, the same command goes on.

    Args:
        captioner: BLIP that writes, or several: what `jaxmm.load` takes.
        filter: BLIP that matches.
        web: Pictures with noisy texts, a source: tars:GLOB, parquet:GLOB, tfds:FOLDER:SPLIT and others.
        out: The folder that holds everything.
        human: Pictures with texts that people wrote, a source; they are scored, and all stay.
        captions: Synthetic captions a picture, of each captioner.
        decoding: How they are written; nucleus sampling with p = 0.9, if not said.
        prompt: What captions begin with; as in training, if not said.
        seed: Of what is drawn. A picture's captions depend on it and on the picture's key alone.
        rule: Which texts stay.
        human_weight: How often a record of people counts in the source that is printed at the end.
        shard_records: Records of a shard, where the source has no shards.
        data_dir: Where prepared TFDS data sets lie.
        hosts: Which processes work together; `out` is then a folder that all share.
    """
    with distributed(hosts, out, name="out"):
        caption(captioner, web, out, human, captions, decoding, prompt, seed, shard_records, data_dir, hosts)
        score(filter, out, data_dir, hosts)
        select(out, rule, data_dir, hosts)
        merge(out, human_weight, data_dir, hosts)


def caption(
    captioner: Names, web: str, out: Path, human: str | None = None, captions: int = 1, decoding: Decoding = NUCLEUS,
    prompt: str | None = None, seed: int = 0, shard_records: int = stages.SIZE, data_dir: str | None = None,
    hosts: HostsConfig = HERE,
) -> None:
    """The first stage: synthetic captions beside the web's texts, in OUT/captions.

    Args:
        captioner: BLIP that writes, or several: what `jaxmm.load` takes.
        web: Pictures with noisy texts, a source.
        out: The folder that holds everything.
        human: Pictures with texts that people wrote, a source.
        captions: Synthetic captions a picture, of each captioner.
        decoding: How they are written; nucleus sampling with p = 0.9, if not said.
        prompt: What captions begin with; as in training, if not said.
        seed: Of what is drawn.
        shard_records: Records of a shard, where the source has no shards.
        data_dir: Where prepared TFDS data sets lie.
        hosts: Which processes work together.
    """
    require(len(captioner) > 0 or captions == 0, "captioner", captioner, "one or more")
    with distributed(hosts, out, name="out"):
        folder = stages.begin(out, web, human, size=shard_records, data_dir=data_dir)
        told(out / stages.CAPTIONS, stages.write_captions(folder, captioner, decoding=decoding, captions=captions,
                                                          seed=seed, prompt=prompt))


def score(filter: str, out: Path, data_dir: str | None = None, hosts: HostsConfig = HERE) -> None:
    """The second stage: whether each text belongs to its picture, in OUT/scores.

    Args:
        filter: BLIP that matches: what `jaxmm.load` takes.
        out: The folder of the first stage.
        data_dir: Where prepared TFDS data sets lie.
        hosts: Which processes work together.
    """
    with distributed(hosts, out, name="out"):
        told(out / stages.SCORES, stages.write_scores(stages.Folder(out, data_dir), filter))


def select(out: Path, rule: Flat = KEPT, data_dir: str | None = None, hosts: HostsConfig = HERE) -> None:
    """The third stage: which texts stay, in OUT/selected. No model is loaded; the rule may be changed.

    Args:
        out: The folder of the stages before.
        rule: Which texts stay.
        data_dir: Where prepared TFDS data sets lie.
        hosts: Which processes work together.
    """
    with distributed(hosts, out, name="out"):
        told(out / stages.SELECTED, stages.select(stages.Folder(out, data_dir), rule))


def merge(out: Path, human_weight: int = 1, data_dir: str | None = None, hosts: HostsConfig = HERE) -> None:
    """The fourth stage: what stays and people's texts as the TFDS data set OUT/merged; and the report.

    Args:
        out: The folder of the stages before.
        human_weight: How often a record of people counts in the source that is printed.
        data_dir: Where prepared TFDS data sets lie.
        hosts: Which processes work together.
    """
    require(human_weight > 0, "human_weight", human_weight, "a positive number")
    with distributed(hosts, out, name="out"):
        folder = stages.Folder(out, data_dir)
        merged = merge_kept(folder)
        if jax.process_index() == 0:
            report(out, data_dir=data_dir)
            print(f"train on it: --data.train '{merged_source(merged, human_weight)}'")


def report(out: Path, json: bool = False, data_dir: str | None = None) -> None:
    """Writes OUT/report.html: what was noise, what stays, how captions differ, pictures to look at.

    Args:
        out: The folder of the stages before.
        json: Print the numbers as one JSON object instead.
        data_dir: Where prepared TFDS data sets lie.
    """
    folder = stages.Folder(out, data_dir)
    measured = reports.measure(folder.tables(stages.SELECTED))
    if json:
        print_json(measured)
        return
    print_table(("origin", "texts", "stay", "dropped"), (
        (origin, f"{found['texts']:,}", f"{found['kept']:,}", f"{found['noise']:.1%}")
        for origin, found in measured["origins"].items()))
    bad = ", ".join(f"{count:,} {reason}" for reason, count in measured["bad"].items())
    print(f"{measured['left']:,} of {measured['pictures']:,} pictures keep a text; "
          f"{sum(measured['bad'].values()):,} records could not be used{f' ({bad})' if bad else ''}")
    print(f"report: {reports.write_report(folder)}")


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """The whole procedure: pre-train, fine-tune captioner and filter, caption and filter the web, pre-train anew.
    Interrupted, the same command goes on. Any field of the recipe can be set besides."""

    config: Path
    """A recipe whose get_config() gives a CapFiltConfig, such as configs/capfilt_scenes.py. Its fields are the options
    below."""
    out: Path | None = None
    """The folder that holds everything; needed."""
    hosts: HostsConfig = HERE
    """Which processes work together; `out` is then a folder that all share."""
    recipe: Annotated[bootstraps.CapFiltConfig, tyro.conf.arg(name="")]


def run_bootstrap(args: Sequence[str]) -> None:
    """The command `jaxmm capfilt bootstrap` with its options."""
    command = parse_recipe(Bootstrap, args, recipe=bootstraps.CapFiltConfig, name="recipe",
                           prog="jaxmm capfilt bootstrap", description=Bootstrap.__doc__)
    require(command.out is not None, "out", None, "--out FOLDER")
    with distributed(command.hosts, command.out, name="out"):
        metrics = bootstraps.bootstrap(command.recipe, command.out)
        if metrics and jax.process_index() == 0:
            bootstraps.print_metrics(metrics)


def bootstrap(config: Path, out: Path) -> None:
    """The whole procedure: pre-train, fine-tune captioner and filter, caption and filter the web, pre-train anew.

    Args:
        config: A recipe, such as configs/capfilt_scenes.py; with it, `--help` shows all options.
        out: The folder that holds everything.
    """


def told(where: Path, shards: int) -> None:
    """One line."""
    if jax.process_index() == 0:
        print(f"{where}: {shards:,} shards written" if shards else f"{where}: there already, nothing to do")
