"""`jaxmm capfilt`: better captions for a crawl, stage by stage or all at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from jaxmm.capfilt import bootstrap as bootstraps
from jaxmm.capfilt import html_report as reports
from jaxmm.capfilt import stages
from jaxmm.capfilt.bootstrap import CapFiltConfig
from jaxmm.capfilt.merge import merge as merge_kept
from jaxmm.capfilt.merge import merged_source
from jaxmm.capfilt.selection import Rule
from jaxmm.capfilt.synthetic_captions import DEFAULTS, CaptionOptions
from jaxmm.cli.parsing import with_recipe
from jaxmm.compiling import use_compilation_cache
from jaxmm.hosts.startup import HostsConfig, distributed
from jaxmm.terminal import print_json, print_table
from jaxmm.validation import require

FlatRule = Annotated[Rule, tyro.conf.arg(name="")]
FlatOptions = Annotated[CaptionOptions, tyro.conf.arg(name="")]
Models = tuple[str, ...]
RULE = Rule()
HOSTS = HostsConfig()


def run(
    captioner: Models, filter: Models, web: str, out: Path, human: str | None = None, options: FlatOptions = DEFAULTS,
    embeddings: str | None = None, rule: FlatRule = RULE, human_weight: int = 1,
    shard_records: int = stages.SHARD_RECORDS, data_dir: str | None = None, hosts: HostsConfig = HOSTS,
) -> None:
    """Caption, score, select and merge, and write the report.

    If it is interrupted, the same command continues.

    Args:
        captioner: One or more models that caption, as `jaxmm.load` takes them.
        filter: One or more models that match or embed, as `jaxmm.load` takes them; all but one as NAME=MODEL.
        web: Source of images with noisy texts: tars:GLOB, parquet:GLOB, tfds:FOLDER:SPLIT and others.
        out: Folder of everything.
        human: Source of images with human captions; they are scored, and all stay.
        options: Options of the synthetic captions.
        embeddings: Name of a cosine whose embeddings of images are stored, for `--near-duplicates`.
        rule: Rule of which texts stay.
        human_weight: Times that each human record counts in the source that is printed at the end.
        shard_records: Records per shard, if the source has no shards.
        data_dir: Folder of prepared TFDS data sets.
        hosts: Processes that work together; `out` is then a folder that all of them share.
    """
    with distributed(hosts, out, name="out"):
        caption(captioner, web, out, human, options, shard_records, data_dir, hosts)
        score(filter, out, embeddings, data_dir, hosts)
        select(out, rule, data_dir, hosts)
        merge(out, human_weight, data_dir, hosts)


def caption(
    captioner: Models, web: str, out: Path, human: str | None = None, options: FlatOptions = DEFAULTS,
    shard_records: int = stages.SHARD_RECORDS, data_dir: str | None = None, hosts: HostsConfig = HOSTS,
) -> None:
    """Write synthetic captions beside the web's texts: the first stage.

    The result is in OUT/captions.

    Args:
        captioner: One or more models that caption, as `jaxmm.load` takes them.
        web: Source of images with noisy texts.
        out: Folder of everything.
        human: Source of images with human captions.
        options: Options of the synthetic captions.
        shard_records: Records per shard, if the source has no shards.
        data_dir: Folder of prepared TFDS data sets.
        hosts: Processes that work together.
    """
    require(len(captioner) > 0 or options.captions == 0, "captioner", captioner, "one or more")
    use_compilation_cache()
    with distributed(hosts, out, name="out"):
        folder = stages.begin(out, web, human, size=shard_records, data_dir=data_dir)
        print_shards(out / stages.CAPTIONS, stages.write_captions(folder, captioner, options))


def score(
    filter: Models, out: Path, embeddings: str | None = None, data_dir: str | None = None, hosts: HostsConfig = HOSTS,
) -> None:
    """Score how well each text belongs to its image: the second stage.

    The result is in OUT/scores. A filter without a name has the scores itm and itc; another one, given as NAME=MODEL,
    NAME (the probability if it matches, else the cosine) and, if it does both, NAME_itc.

    Args:
        filter: One or more models that match or embed, as `jaxmm.load` takes them; all but one as NAME=MODEL.
        out: Folder of the first stage.
        embeddings: Name of a cosine whose embeddings of images are stored, for `--near-duplicates`.
        data_dir: Folder of prepared TFDS data sets.
        hosts: Processes that work together.
    """
    use_compilation_cache()
    with distributed(hosts, out, name="out"):
        print_shards(out / stages.SCORES, stages.write_scores(stages.Folder(out, data_dir), filter,
                                                                    embeddings))


def select(out: Path, rule: FlatRule = RULE, data_dir: str | None = None, hosts: HostsConfig = HOSTS) -> None:
    """Select the texts that stay: the third stage.

    The result is in OUT/selected. No model is loaded; the rule may be changed.

    Args:
        out: Folder of the stages before.
        rule: Rule of which texts stay.
        data_dir: Folder of prepared TFDS data sets.
        hosts: Processes that work together.
    """
    with distributed(hosts, out, name="out"):
        print_shards(out / stages.SELECTED, stages.select(stages.Folder(out, data_dir), rule))


def merge(out: Path, human_weight: int = 1, data_dir: str | None = None, hosts: HostsConfig = HOSTS) -> None:
    """Merge what stays with the human captions: the fourth stage.

    The result is the TFDS data set OUT/merged, and the report.

    Args:
        out: Folder of the stages before.
        human_weight: Times that each human record counts in the source that is printed.
        data_dir: Folder of prepared TFDS data sets.
        hosts: Processes that work together.
    """
    require(human_weight > 0, "human_weight", human_weight, "a positive number")
    with distributed(hosts, out, name="out"):
        folder = stages.Folder(out, data_dir)
        merged = merge_kept(folder)
        if jax.process_index() == 0:
            report(out, data_dir=data_dir)
            print(f"train on it: --data.train '{merged_source(merged, human_weight)}'")


def report(out: Path, json: bool = False, data_dir: str | None = None) -> None:
    """Write OUT/report.html: what was noise, what stays, how captions differ.

    Args:
        out: Folder of the stages before.
        json: Print the numbers as one JSON object instead of a table and the report.
        data_dir: Folder of prepared TFDS data sets.
    """
    folder = stages.Folder(out, data_dir)
    measured = reports.measure(folder.tables(stages.SELECTED))
    if json:
        print_json(measured)
        return
    print_table(("origin", "texts", "stay", "dropped"), (
        (origin, f"{counts['texts']:,}", f"{counts['kept']:,}", f"{counts['noise']:.1%}")
        for origin, counts in measured["origins"].items()))
    if measured["near_duplicates"]:
        print(f"{measured['near_duplicates']:,} images are nearly the same as another one")
    bad = ", ".join(f"{count:,} {reason}" for reason, count in measured["bad"].items())
    print(f"{measured['left']:,} of {measured['pictures']:,} images keep a text; "
          f"{sum(measured['bad'].values()):,} records could not be used{f' ({bad})' if bad else ''}")
    print(f"report: {reports.write_report(folder)}")


@dataclass(frozen=True, kw_only=True)
class BootstrapOptions:
    """Options of the command that are not part of the recipe."""

    config: Path
    """A recipe whose get_config() gives a CapFiltConfig, such as `capfilt_scenes`. Its fields are options too."""
    out: Path | None = None
    """Folder of everything; required."""
    hosts: HostsConfig = HOSTS
    """Processes that work together; `out` is then a folder that all of them share."""


@with_recipe(BootstrapOptions, CapFiltConfig)
def bootstrap(options: BootstrapOptions, config: CapFiltConfig) -> None:
    """Run the whole procedure: train captioner and filter, caption and filter the web, train a new model.

    If it is interrupted, the same command continues.
    """
    require(options.out is not None, "out", None, "--out FOLDER")
    use_compilation_cache()
    with distributed(options.hosts, options.out, name="out"):
        metrics = bootstraps.bootstrap(config, options.out)
        if metrics and jax.process_index() == 0:
            bootstraps.print_metrics(metrics)


def print_shards(folder: Path, shards: int) -> None:
    """Print how many shards a stage wrote to `folder`."""
    if jax.process_index() == 0:
        print(f"{folder}: {shards:,} shards written" if shards else f"{folder}: there already, nothing to do")
