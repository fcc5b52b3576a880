"""`jaxmm data`: import, check and show sources."""

import os
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from jaxmm.cli.parsing import positional
from jaxmm.data import DataError, Source, open_source
from jaxmm.data.cleaning import printable
from jaxmm.terminal import print_json, print_table

Spec = Annotated[str, *positional("SOURCE")]
Dest = Annotated[Path, *positional("DEST")]


def import_data(
    source: Spec, dest: Dest, split: str = "train", workers: int | None = None, shard_records: int = 1000,
    data_dir: str | None = None,
) -> None:
    """Write a source as a TFDS data set that `tfds:DEST:train` reads.

    Each shard of the source becomes one shard. Every image is decoded. Records that cannot be used are left out,
    counted by reason and named; images that other readers would show rotated, in other colours or not at all become
    PNG. If it is interrupted, the same command continues.

    Args:
        source: tars:GLOB, parquet:GLOB, coco:FILE.json, captions:FILE.jsonl, folder:DIR and others.
        dest: A new folder.
        split: Name of the split in the data set.
        workers: Number of processes. Default: one per core. The result does not depend on it.
        shard_records: Records per shard, if the source has no shards.
        data_dir: Folder of prepared TFDS data sets.
    """
    from jaxmm.data.tools.importing import import_source, summary

    opened = _open(source, data_dir, shard_records)
    with _progress(opened, shard_records, "importing") as on_shard:
        imported = import_source(opened, dest, split=split, workers=_workers(workers), shard_records=shard_records,
                                 on_shard=on_shard)
    done = "there already, nothing to do: " if imported.complete_before else ""
    print(f"{printable(str(dest))}: {done}{summary(imported)}")


def check_data(
    source: Spec, workers: int | None = None, json: bool = False, records: bool = False, data_dir: str | None = None,
) -> int:
    """Report what is in a source and which records cannot be used, and why.

    Nothing is written. The exit status is 1 if no record can be used.

    Args:
        source: tars:GLOB, parquet:GLOB, coco:FILE.json, captions:FILE.jsonl, folder:DIR and others.
        workers: Number of processes. Default: one per core.
        json: Print one JSON object instead of tables.
        records: Print one line of JSON per record (key, usable, reason, detail) instead.
        data_dir: Folder of prepared TFDS data sets.
    """
    from jaxmm.data.tools.checking import check

    opened = _open(source, data_dir)
    with _progress(opened, 1000, "checking") as on_shard:
        report = check(opened, workers=_workers(workers), on_shard=on_shard,
                       on_record=(lambda judgement: print_json(asdict(judgement))) if records else None)
    status = 0 if report["usable"] else 1
    if records:
        return status
    if json:
        print_json(report)
        return status
    print(f"{printable(source)}: {report['usable']:,} of {report['records']:,} records can be used; "
          f"{report['texts']:,} captions; {report['duplicates']:,} duplicate images")
    if report["broken"]:
        print_table(("why not", "records", "first"), (
            (reason, f"{count:,}", ", ".join(report["examples"][reason]))
            for reason, count in report["broken"].items()))
    measured = [(name.replace("_", " "), report[name]) for name in ("width", "height", "caption_words") if report[name]]
    if measured:
        print_table(("", *measured[0][1]), ((name, *(f"{value:g}" for value in values.values()))
                                            for name, values in measured))
    for fault in report["faults"]:
        print(f"{printable(fault['shard'])}: {fault['fault']}")
    return status


def show_data(source: Spec, count: int = 8, html: Path | None = None, data_dir: str | None = None) -> int:
    """Show the first records of a source: a table, or one HTML file with the images.

    The exit status is 1 if no record of the source can be used.

    Args:
        source: tars:GLOB, parquet:GLOB, coco:FILE.json, captions:FILE.jsonl, folder:DIR and others.
        count: Number of records.
        html: File to write instead of the table.
        data_dir: Folder of prepared TFDS data sets.
    """
    from jaxmm.data.tools import showing

    if count < 1:
        raise DataError(f"count is {count}; expected 1 or more")
    opened = _open(source, data_dir)
    shown = showing.first(opened, count)
    status = 1 if len(shown) == len(opened) and not any(record.images for record in shown) else 0
    if html is not None:
        showing.write_html(source, shown, html)
        print(f"{printable(str(html))}: {len(shown)} records")
        return status
    print_table(("key", "size", "texts"), ((record.key, record.size, "\n".join(record.texts)) for record in shown))
    return status


def _open(spec: str, data_dir: str | None, shard_records: int = 1000) -> Source:
    if shard_records < 1:
        raise DataError(f"shard_records is {shard_records}; expected 1 or more")
    return open_source(spec, data_dir=data_dir)


def _workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; expected 1 or more")
    return workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count()


@contextmanager
def _progress(source: Source, shard_records: int, what: str):
    """Show a bar over the shards with records/s; yield the function that takes the record count of each shard."""
    total = len(source.shards()) or -(-len(source) // shard_records)
    done = 0
    with tqdm(total=total, desc=what, unit=" shards", dynamic_ncols=True, file=sys.stderr,
              disable=None if total > 1 else True) as bar:
        def on_shard(records: int) -> None:
            nonlocal done
            done += records
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{done:,} records, {done / max(elapsed, 1e-3):,.0f}/s", refresh=False)
            bar.update()

        yield on_shard
