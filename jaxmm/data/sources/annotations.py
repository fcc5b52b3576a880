"""Read annotation files: JSON, JSON lines, CSV and TSV, in which a line that cannot be read is one bad record."""

import codecs
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmm.data.base import EXTENSIONS, DataError
from jaxmm.data.sources.columns import NAMES, Columns
from jaxmm.paths import user_path

DELIMITERS = (",", "\t", ";", "|")
"""Marks between cells that are tried first; then every other one in the first line."""
LONGEST_CELL = 100
"""The largest number of lines of one cell."""
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_OTHER_FILES = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet (see parquet:GLOB)"}


@dataclass(frozen=True)
class Row:
    """One line or entry: an object, or the reason why there is none."""

    place: str
    """The place in the file, for messages: its line or entry."""
    value: dict[str, Any] | None
    fault: str | None = None


@dataclass(frozen=True)
class Annotations:
    """The text of a file, and what it contains."""

    text: str = field(repr=False)
    notes: tuple[str, ...] = ()
    content: Any = field(default=None, repr=False)
    """The JSON value, if the file is one object or one list."""
    rows: tuple[Row, ...] = field(default=(), repr=False)
    """The rows of a list, of lines or of a table."""


def read_text(spec: str, path: str | Path) -> tuple[str, tuple[str, ...]]:
    """Return the text of a file, and notes if it is not UTF-8. Raises `DataError`."""
    try:
        data = user_path(path).read_bytes()
    except OSError as error:
        raise DataError(f"source {spec!r}: cannot read {path}: {error.strerror or error}") from None
    for magic, name in _OTHER_FILES.items():
        if data.startswith(magic):
            raise DataError(f"source {spec!r}: {path} is {name}; expected text")
    text, note = _decode(data)
    notes = () if note is None else (f"{path} {note}",)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), notes


def _decode(data: bytes) -> tuple[str, str | None]:
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "utf-8")
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    text = data.decode(encoding, "replace")
    if encoding == "utf-8" and not any(c > "\x7f" and c != "\ufffd" for c in text):  # nothing in it is valid UTF-8
        return data.decode("cp1252", "replace"), f"is not UTF-8 (line {line}) and is read as Windows-1252"
    return text, f"is not UTF-8 in {text.count(chr(0xfffd))} places (the first in line {line}), which become \ufffd"


def read_json(spec: str, path: str | Path) -> Annotations:
    """Read one JSON value. Raises `DataError` with the line of the first mistake."""
    text, notes = read_text(spec, path)
    try:
        return Annotations(text, notes, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DataError(f"source {spec!r}: {path}:{getattr(error, 'lineno', 1)} is not JSON: {error}") from None


def read_rows(spec: str, path: str | Path, columns: Columns, needed: Sequence[str] = ("image", "caption")
              ) -> Annotations:
    """Read a JSON list, JSON lines, or a table with a header or with the columns `needed` in this order.

    One JSON object is returned as `content`, without rows. Raises `DataError` if no row can be read.
    """
    text, notes = read_text(spec, path)
    where = f"source {spec!r}: {path}"
    rows = content = None
    if text.lstrip()[:1] not in ("", "{", "["):
        try:
            rows = _table(where, text, columns, needed)
        except DataError:
            if Path(path).suffix.lower() not in (".json", ".jsonl", ".ndjson"):
                raise
    if rows is None:
        content, rows = _json_rows(where, text)
        if rows is None:
            return Annotations(text, notes, content)
    if rows and all(row.value is None for row in rows):
        raise DataError(f"{where}{rows[0].place} {rows[0].fault}")
    return Annotations(text, notes, None, tuple(rows))


def _json_rows(where: str, text: str) -> tuple[Any, list[Row] | None]:
    """Return a JSON object and no rows, or the rows of a list or of lines."""
    if not text.strip():
        return None, []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        rows = [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if 2 * sum(row.value is not None for row in rows) > len(rows) > 1:
            return None, rows
        line = getattr(error, "lineno", 1)
        good = next((row for row in rows if row.value is not None), None)
        bad = rows[0] if good is None else next(row for row in rows if row.value is None)
        raise DataError(f"{where}{bad.place} {bad.fault}" if good else f"{where}:{line} is not JSON: {error}") from None
    if isinstance(content, list):
        return None, [_row(f", entry {number}", value) for number, value in enumerate(content)]
    if not isinstance(content, dict):
        raise DataError(f"{where} is {type(content).__name__}; expected objects")
    return content, None


def _line(number: int, line: str) -> Row:
    try:
        return _row(f":{number}", json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(f":{number}", None, f"is not JSON: {error}")


def _row(place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    if isinstance(value, list):  # of easy-VQA
        return Row(place, {str(number): part for number, part in enumerate(value)})
    return Row(place, None, f"is {type(value).__name__}; expected an object")


def _table(where: str, text: str, columns: Columns, needed: Sequence[str]) -> list[Row]:
    """Read a table with the delimiter under which its first line has the columns, or looks like a row without header.

    Raises `DataError`.
    """
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return []
    marks = dict.fromkeys(c for c in lines[first] if not c.isalnum() and c not in "\"'_-./\\ ")
    for delimiter in (*DELIMITERS, *marks):
        header = [cell.strip() for cell in _split_line(lines[first], delimiter)]
        if len(header) >= len(needed) and all(columns.candidates(name, header) for name in needed):
            return _cells(lines, first + 1, delimiter, header)
    for delimiter in ("\t", *DELIMITERS):
        cells = _split_line(lines[first], delimiter)
        if len(cells) == len(needed) and _image_of(cells[0]) is not None:
            header = [NAMES.get(name, (name,))[0] for name in needed]
            return [_numbered(row) for row in _cells(lines, first, delimiter, header)]
    header = max((_split_line(lines[first], delimiter) for delimiter in DELIMITERS), key=len) or [lines[first]]
    raise DataError(f"{where}: its columns are {', '.join(repr(cell.strip()[:40]) for cell in header[:20])}; expected "
                    f"one for each of {', '.join(needed)}. Name them, as in FILE@"
                    + ",".join(f"{name}=NAME" for name in needed))


def _split_line(line: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[str]:
    """Return the cells of one line; none if it cannot be read, because a cell is too large."""
    try:
        return next(csv.reader([line], delimiter=delimiter, quoting=quoting, skipinitialspace=True), [])
    except (csv.Error, ValueError):
        return []


def _image_of(cell: str) -> str | None:
    """Return the image file in a cell such as `1.jpg#0` (Flickr8k, Flickr30k); None if it names none."""
    name, mark, number = cell.strip().rpartition("#")
    file = name if mark and number.isdigit() else cell.strip()
    return file if file.lower().endswith(EXTENSIONS) else None


def _numbered(row: Row) -> Row:
    if row.value is None:
        return row
    name = next(iter(row.value))
    return Row(row.place, row.value | {name: _image_of(row.value[name]) or row.value[name]})


def _cells(lines: Sequence[str], start: int, delimiter: str, header: Sequence[str]) -> list[Row]:
    """Read the rows from line `start` on. A cell in quotes may contain the delimiter, quotes and line breaks.

    A row whose quotes are not closed, or that has more or fewer cells than the header, is a fault of its first line.
    """
    rows = []
    repeated = {name for name in header if list(header).count(name) > 1}
    while start < len(lines):
        stop, cells = start + 1, None
        while cells is None and stop <= min(len(lines), start + LONGEST_CELL):
            chunk = "\n".join(lines[start:stop])
            try:
                cells = next(csv.reader(io.StringIO(chunk, newline="\n"), delimiter=delimiter, strict=True,
                                        skipinitialspace=True), [])
            except csv.Error as error:
                if "unexpected end" not in str(error):
                    break
                stop += 1
        if cells is None or (len(cells) != len(header) and stop > start + 1):
            stop = start + 1  # quotes that mean themselves
            cells = _split_line(lines[start], delimiter, csv.QUOTE_NONE)
        place = f":{start + 1}"
        if len(cells) == len(header):
            row = dict(zip(header, map(str.strip, cells), strict=True))
            row |= {name: [cell for column, cell in zip(header, cells, strict=True) if column == name]
                    for name in repeated}
            rows.append(Row(place, row))
        elif lines[start].strip():
            rows.append(Row(place, None, f"cannot be read: it has {len(cells)} columns; expected {len(header)}"))
        start = stop
    return rows


def normal_ids(defined: Sequence[Any], used: Sequence[Any]) -> tuple[list[str | None], list[str | None]]:
    """Return ids as texts that match whatever their JSON type: 7, "7", 7.0 and "000000000007".

    Leading zeros count if ids that are `defined` differ in them only. None is for null and what is no id.
    """
    groups = [_id(value) for value in defined], [_id(value) for value in used]
    different = set(groups[0]) - {None}
    if len(set(map(_without_zeros, different))) < len(different):
        return groups
    return tuple([None if value is None else _without_zeros(value) for value in group] for group in groups)


def _without_zeros(value: str) -> str:
    return value.lstrip("0") or "0" if value.isdecimal() else value


def _id(value: Any) -> str | None:
    if isinstance(value, bool) or value is None or isinstance(value, (list, dict)):
        return None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value == int(value) else None
    return str(value).strip()
