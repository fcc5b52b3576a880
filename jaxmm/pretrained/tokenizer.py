"""The tokenizer that a checkpoint was published with: found among its files, and written to what is saved."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.io.hub import Files

FILES = {
    "openai": ("bpe_simple_vocab_16e6.txt.gz", "tokenizer.json", "vocab.json"),
    "transformers": ("tokenizer.json", "vocab.json"), "file": ("tokenizer.json", "spiece.model"),
    "bert": ("tokenizer.json", "vocab.txt")}
"""Where a vocabulary may be, the preferred first."""

SIGLIP_CLASSES: tuple[tuple[str, Cleaning], ...] = (("Siglip2", "lower"), ("Gemma", "lower"), ("Siglip", "siglip"))
"""What transformers' tokenizer classes, by how their names begin, do to a text outside `tokenizer.json`."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """How a family reads texts."""

    vocabulary: Literal["openai", "transformers", "file", "bert"]
    """openai: CLIP's merges under OpenAI's rules, from any file that holds them; transformers: the same merges under
    the rules of `CLIPTokenizer`; file: what `tokenizer.json` says, or a `spiece.model`; bert: the same, or
    BERT's `vocab.txt`."""
    cleaning: Cleaning = "none"
    special: tuple[str, str] = CLIP_SPECIAL
    """What CLIP's begin and end are called in a text (open_clip gave them other names)."""


def read_tokenizer(files: Files, words: Words, context_length: int, given: Path | None = None) -> Tokenizer | None:
    """The tokenizer in `files.folder`, or in the file or folder `given`; None where there is none.

    Raises `FileError` for a vocabulary that cannot be read.
    """
    folder = files.folder if given is None else given
    if not folder.exists():
        raise FileError(f"tokenizer is {str(folder)!r}, which does not exist")
    if folder.is_file():
        path = folder
    else:
        found = next((name for name in FILES[words.vocabulary] if (folder / name).is_file()), None)
        if found is None:
            return None
        path = folder / found
    read: Callable[..., Tokenizer] = {
        "openai": _openai, "transformers": _transformers, "file": _file, "bert": _bert}[words.vocabulary]
    try:
        return read(path, files, words, context_length)
    except Exception as error:  # the library raises bare Exceptions
        raise FileError(f"{path} holds no tokenizer of this model: {type(error).__name__}: {error}") from None


def _openai(path: Path, files: Files, words: Words, context_length: int) -> Tokenizer:
    backend, special = read_clip(path.parent if path.name == "vocab.json" else path)
    if words.special != CLIP_SPECIAL:
        model = json.loads(backend.to_str())
        for old, new in zip(CLIP_SPECIAL, words.special, strict=True):
            model["model"]["vocab"][new] = model["model"]["vocab"].pop(old)
        backend = tokenizers.Tokenizer.from_str(json.dumps(model))
    return Tokenizer(backend, context_length, **special, cleaning="openai", literal=words.special)


def _transformers(path: Path, files: Files, words: Words, context_length: int) -> Tokenizer:
    if path.name == "vocab.json" or path.name.endswith((".gz", ".txt")):
        backend, special = read_clip(path.parent if path.name == "vocab.json" else path)
        backend = _as_clip_tokenizer(backend)
    else:
        backend, special = read_file(path)
    special["pad_id"] = _pad(files, backend, special["eos_id"])
    return Tokenizer(backend, context_length, **special, cleaning=words.cleaning, literal=_special(backend))


def _file(path: Path, files: Files, words: Words, context_length: int) -> Tokenizer:
    backend, special = read_sentencepiece(path) if path.suffix == ".model" else read_file(path)
    special["pad_id"] = _pad(files, backend, special["pad_id"])
    cleaning, kind = words.cleaning, (files.json("tokenizer_config.json") or {}).get("tokenizer_class")
    if cleaning in ("siglip", "lower") and isinstance(kind, str):
        cleaning = next((each for name, each in SIGLIP_CLASSES if kind.startswith(name)), "none")
    return Tokenizer(backend, context_length, **special, cleaning=cleaning, literal=_special(backend))


def _bert(path: Path, files: Files, words: Words, context_length: int) -> Tokenizer:
    """BLIP learns to write what it reads: unlike transformers', a text cannot name [SEP] or [PAD]."""
    backend, special = read_bert(path) if path.suffix == ".txt" else read_file(path)
    return Tokenizer(backend, context_length, **special)


def _special(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    return tuple(token.content for token in backend.get_added_tokens_decoder().values() if token.special)


def _pad(files: Files, backend: tokenizers.Tokenizer, default: int) -> int:
    """The id of the padding token that the configuration beside the vocabulary names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = (files.json(name) or {}).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (found := backend.token_to_id(token)) is not None:
            return found
    return default


def _as_clip_tokenizer(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """CLIP's merges under the rules of transformers' `CLIPTokenizer`, which clean a text less than OpenAI's do."""
    backend.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens(list(CLIP_SPECIAL))
    return backend


def is_openai(tokenizer: Tokenizer | None) -> bool:
    """Whether open_clip, without being told anything, reads texts as `tokenizer` does; None: there is no other."""
    return tokenizer is None or (tokenizer.cleaning == "openai" and tokenizer.vocab_size == 49_408)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """What transformers loads a tokenizer from, by file name; it gives the same ids.

    Except for what no `tokenizer.json` can express of OpenAI's cleaning: the repair of mojibake and HTML entities.
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


def _normalizers(cleaning: Cleaning) -> list[normalizers.Normalizer]:
    """`cleaning` in the terms of the `tokenizers` library."""
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
