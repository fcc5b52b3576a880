"""Clean texts and names: what is no text is left out, and what cannot be written as UTF-8 is replaced."""

import codecs
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

NULLS = frozenset({"None", "nan", "NaN", "null", "NULL", "<NA>"})
"""Texts that other tools write for a missing caption."""
TEXT_NAMES = ("text", "caption", "raw", "sentence", "answer")
"""Names of the text in an object. The first one with a value is used."""

_UNCLEAN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")


def clean(text: str | bytes) -> str:
    """Return text that can be written as UTF-8, without control characters; invalid bytes are replaced."""
    if isinstance(text, bytes):
        wide = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = text.decode("utf-16" if wide else "utf-8", "replace")
    return _UNCLEAN.sub(_replacement, text)


def _replacement(match: re.Match) -> str:
    character = match[0]
    return "?" if "\ud800" <= character <= "\udfff" else " " if character.isspace() else ""


def printable(name: str) -> str:
    """Return an untrusted name with the characters replaced that a terminal would interpret."""
    name = name.encode("utf-8", "replace").decode().replace("\0", "")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def texts_of(value: Any, names: Sequence[str] = TEXT_NAMES) -> tuple[str, ...]:
    """Return the texts in `value`, cleaned: a text, a number, an object with a text under one of `names`, or a list.

    Null, NaN and everything else is no text.
    """
    if isinstance(value, (str, bytes)):
        return (clean(value),)
    if isinstance(value, Mapping):
        return texts_of(next((value[name] for name in names if value.get(name) is not None), None), names)
    if isinstance(value, np.ndarray):
        value = value.tolist()
        return texts_of(value, names)
    if isinstance(value, (list, tuple)):
        return tuple(text for part in value for text in texts_of(part, names))
    if isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value):
        return (str(value),)
    return ()


def usable_texts(value: Any, names: Sequence[str] = TEXT_NAMES) -> tuple[str, ...]:
    """Return the texts in `value` (see `texts_of`) that are neither blank nor a word for a missing one."""
    return tuple(text for text in texts_of(value, names) if text.strip() and text.strip() not in NULLS)


def texts_with_origins(texts: Any, origins: Any) -> dict[str, tuple[str, ...]]:
    """Return the `texts` of a record that are usable (see `usable_texts`), and their `origins` if there are any.

    One origin is that of all texts. Raises `ValueError` for another number of origins than of texts.
    """
    texts, origins = texts_of(texts), texts_of(origins)
    if not origins:
        return {"texts": usable_texts(texts)}
    if len(origins) not in (1, len(texts)):
        raise ValueError(f"it has {len(texts)} texts and {len(origins)} origins; expected one for each text, or one")
    pairs = [(text, origin) for text, origin in zip(texts, origins * len(texts) if len(origins) == 1 else origins,
                                                    strict=True) if usable_texts(text)]
    return {"texts": tuple(text for text, _ in pairs), "origins": tuple(origin for _, origin in pairs)}


def cleaned_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its texts and names cleaned."""
    changes: dict[str, Any] = {}
    if "texts" in record:
        changes |= texts_with_origins(record["texts"], record.get("origins"))
    if "answers" in record:
        changes["answers"] = texts_of(record["answers"])
    if "question" in record:
        changes["question"] = " ".join(texts_of(record["question"]))
    if "key" in record:
        changes["key"] = printable(str(record["key"]))
    if "image_id" in record:
        changes["image_id"] = clean(str(record["image_id"]))
    return record | changes
