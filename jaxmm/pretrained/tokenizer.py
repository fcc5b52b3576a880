"""Read the tokenizer that a checkpoint was published with, and write it beside exported weights."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from jaxmm.data.tokenizers import (
    CLIP_SPECIAL,
    CLIP_WORDS,
    Cleaning,
    Tokenizer,
    read_bert,
    read_clip,
    read_file,
    read_sentencepiece,
)
from jaxmm.pretrained.io.files import FileError, is_pointer
from jaxmm.pretrained.io.hub import Files

SIGLIP_CLASSES: tuple[tuple[str, Cleaning], ...] = (("Siglip2", "lower"), ("Gemma", "lower"), ("Siglip", "siglip"))
"""Cleaning by transformers' tokenizer classes outside `tokenizer.json`, by how their names begin."""


@dataclass(frozen=True)
class Vocabulary:
    """A family's way to read texts."""

    files: tuple[str, ...]
    """Names of the vocabulary's file, the preferred first."""
    read: Callable[[Path, Files], Tokenizer]
    """Reads such a file, given the checkpoint's other files."""


def read_tokenizer(files: Files, vocabulary: Vocabulary, given: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer in `files.folder`, or in the file or folder `given`; None if there is none.

    Raises `FileError` for a vocabulary that cannot be read.
    """
    path = files.folder if given is None else given
    if not path.exists():
        raise FileError(f"tokenizer is {str(path)!r}, which does not exist")
    if not path.is_file():
        name = next((name for name in vocabulary.files if (path / name).is_file()), None)
        if name is None:
            return None
        path = path / name
    if is_pointer(path):
        raise FileError(f"{path} cannot be read: it is a git-lfs pointer; `git lfs pull` fetches the file")
    try:
        return vocabulary.read(path, files)
    except Exception as error:  # the library raises bare Exceptions
        raise FileError(f"{path} holds no tokenizer of this model: {type(error).__name__}: {error}") from None


def openai_vocabulary(context_length: int, special: tuple[str, str] = CLIP_SPECIAL) -> Vocabulary:
    """Return CLIP's merges under OpenAI's rules, from any file that holds them.

    `special` names begin and end in a text; open_clip's differ.
    """
    def read(path: Path, files: Files) -> Tokenizer:
        backend, ids = _read_merges(path)
        if special != CLIP_SPECIAL:
            model = json.loads(backend.to_str())
            for old, new in zip(CLIP_SPECIAL, special, strict=True):
                model["model"]["vocab"][new] = model["model"]["vocab"].pop(old)
            backend = tokenizers.Tokenizer.from_str(json.dumps(model))
        return Tokenizer(backend, context_length, **ids, cleaning="openai", literal=special)

    return Vocabulary(("bpe_simple_vocab_16e6.txt.gz", "tokenizer.json", "vocab.json"), read)


def clip_vocabulary(context_length: int) -> Vocabulary:
    """Return CLIP's merges under the rules of transformers' `CLIPTokenizer`."""
    def read(path: Path, files: Files) -> Tokenizer:
        if path.name == "vocab.json" or path.name.endswith((".gz", ".txt")):
            backend, ids = _read_merges(path)
            backend = _as_clip_tokenizer(backend)
        else:
            backend, ids = read_file(path)
        ids["pad_id"] = _pad(files, backend, ids["eos_id"])
        return Tokenizer(backend, context_length, **ids, literal=_special(backend))

    return Vocabulary(("tokenizer.json", "vocab.json"), read)


def file_vocabulary(context_length: int, cleaning: Cleaning = "none") -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json` or a `spiece.model`; `cleaning` is done before it."""
    def read(path: Path, files: Files) -> Tokenizer:
        backend, ids = read_sentencepiece(path) if path.suffix == ".model" else read_file(path)
        ids["pad_id"] = _pad(files, backend, ids["pad_id"])
        kind, cleaned = (files.json("tokenizer_config.json") or {}).get("tokenizer_class"), cleaning
        if cleaning in ("siglip", "lower") and isinstance(kind, str):
            cleaned = next((name for prefix, name in SIGLIP_CLASSES if kind.startswith(prefix)), "none")
        return Tokenizer(backend, context_length, **ids, cleaning=cleaned, literal=_special(backend))

    return Vocabulary(("tokenizer.json", "spiece.model"), read)


def siglip_vocabulary(context_length: int, size: int) -> Vocabulary:
    """Return SigLIP's 32,000 tokens without case and punctuation, or SigLIP 2's 256,000 (Gemma's) in lower case."""
    return file_vocabulary(context_length, "siglip" if size <= 2**16 else "lower")


def bert_vocabulary(context_length: int) -> Vocabulary:
    """Return BERT's words. Unlike in transformers, a text cannot name [SEP] or [PAD]: BLIP learns to write texts."""
    def read(path: Path, files: Files) -> Tokenizer:
        backend, ids = read_bert(path) if path.suffix == ".txt" else read_file(path)
        return Tokenizer(backend, context_length, **ids)

    return Vocabulary(("tokenizer.json", "vocab.txt"), read)


def _read_merges(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    return read_clip(path.parent if path.name == "vocab.json" else path)


def _special(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    return tuple(token.content for token in backend.get_added_tokens_decoder().values() if token.special)


def _pad(files: Files, backend: tokenizers.Tokenizer, default: int) -> int:
    """Return the id of the padding token that the configuration beside the vocabulary names, or `default`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = (files.json(name) or {}).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (pad_id := backend.token_to_id(token)) is not None:
            return pad_id
    return default


def _as_clip_tokenizer(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Give CLIP's merges the rules of transformers' `CLIPTokenizer`, which clean a text less than OpenAI's do."""
    backend.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens(list(CLIP_SPECIAL))
    return backend


def is_openai(tokenizer: Tokenizer | None) -> bool:
    """Return whether open_clip reads texts like `tokenizer` by default; true without a tokenizer."""
    return tokenizer is None or (tokenizer.cleaning == "openai" and tokenizer.vocab_size == 49_408)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files from which transformers loads a tokenizer with the same ids, by name.

    No `tokenizer.json` can express one part of OpenAI's cleaning: the repair of mojibake and HTML entities.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    clip = isinstance(backend.model, tokenizers.models.BPE) and all(
        backend.token_to_id(name) is not None for name in CLIP_SPECIAL)
    if clip and tokenizer.cleaning == "openai":
        backend = _as_clip_tokenizer(backend)
    elif (steps := _normalizers(tokenizer.cleaning)):
        backend.normalizer = normalizers.Sequence(steps + ([backend.normalizer] if backend.normalizer else []))

    def name(token: int | None) -> str | None:
        return None if token is None else backend.id_to_token(token)

    bos, eos, pad = name(tokenizer.bos_id), name(tokenizer.eos_id), name(tokenizer.pad_id)
    if clip and tokenizer.pad_id == 0:
        pad = eos  # OpenAI pads by 0, which is the word "!"; the causal mask hides the difference
    backend.add_special_tokens([token for token in dict.fromkeys((bos, eos, pad)) if token])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos or ''} $A {eos}".strip(),
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token])
    config: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer" if clip else "PreTrainedTokenizerFast", "padding_side": "right",
        "model_max_length": tokenizer.context_length, "clean_up_tokenization_spaces": False,
        "eos_token": eos, "pad_token": pad} | ({"bos_token": bos} if bos else {})
    texts = {"tokenizer.json": backend.to_str(pretty=False), "tokenizer_config.json": json.dumps(config, indent=2)}
    if clip:
        model = json.loads(backend.to_str())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        texts |= {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
                  "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}
    return texts


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of `tokenizer_files` into `folder`."""
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")


def _normalizers(cleaning: Cleaning) -> list[normalizers.Normalizer]:
    """Return `cleaning` in the terms of the `tokenizers` library."""
    space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    no_punctuation = normalizers.Replace(tokenizers.Regex(f"[{_escaped(string.punctuation)}]"), "")
    lower = normalizers.Lowercase()
    return {
        "none": [], "lower": [lower], "openai": [normalizers.NFC(), space, lower, normalizers.Strip()],
        "whitespace": [space, normalizers.Strip()],
        "canonical": [normalizers.Replace("_", " "), lower, no_punctuation, space, normalizers.Strip()],
        "siglip": [lower, no_punctuation, space, normalizers.Strip()]}[cleaning]


def _escaped(characters: str) -> str:
    return "".join(f"\\{c}" for c in characters)
