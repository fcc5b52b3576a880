"""Encode texts as token ids: with CLIP's or BERT's vocabulary, any `tokenizer.json`, or a vocabulary trained here.

The `tokenizers` library does the encoding. Text is data only: special tokens written out in a text are split into
ordinary ones. Tokenizers of published checkpoints that do otherwise have `literal`.
"""

import gzip
import html
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxmm.config import TokenizerConfig
from jaxmm.data.base import digest
from jaxmm.paths import local_copy, user_path
from jaxmm.validation import ConfigError

Cleaning = Literal["none", "openai", "whitespace", "canonical", "siglip", "lower"]
"""Cleaning of a text before it is encoded.

openai: repair mojibake and HTML entities, collapse white space, lower case (CLIP); whitespace: the same, without lower
case (open_clip with other vocabularies); canonical: openai without punctuation (open_clip's SigLIP, CLIPA); siglip:
lower case without punctuation (SigLIP in big_vision and transformers); lower: lower case (SigLIP 2).
"""
SETTINGS = "tokenizer_settings.json"
"""The file that `Tokenizer.save` writes last."""
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2      # lines in use of OpenAI's file, after its header


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Encodes texts as rows of `context_length` ids: `bos_id`, the text's ids, `eos_id`, then `pad_id`.

    A text that is too long is cut; `eos_id` always stays. Of a very long text only the first 128 characters per token
    of context are read.
    """

    backend: tokenizers.Tokenizer
    context_length: int
    pad_id: int
    bos_id: int | None
    eos_id: int
    cleaning: Cleaning = "none"
    literal: tuple[str, ...] = ()
    """Special tokens that are encoded as such if they are written out in a text, as some published tokenizers do."""

    def __post_init__(self):
        """Turn off the backend's truncation and padding, and the encoding of special tokens in texts."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not self.literal or self.cleaning == "openai"

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "b t"]:
        """Encode `texts`, cut and padded to `context_length`."""
        if isinstance(texts, str):
            raise TypeError(f"texts is the string {texts[:40]!r}; expected a list of strings")
        cleaned = [_clean(text, 128 * self.context_length, self.cleaning) for text in texts]
        if len(cleaned) < 64:      # the batch call starts threads
            encoded = [self.backend.encode(text, add_special_tokens=False).ids for text in cleaned]
        else:
            encoded = [encoding.ids for encoding in self.backend.encode_batch_fast(cleaned, add_special_tokens=False)]
        if self.literal and self.cleaning == "openai":
            encoded = [self._encode_literal(text) if any(name in text for name in self.literal) else ids
                       for text, ids in zip(cleaned, encoded, strict=True)]
        first = [] if self.bos_id is None else [self.bos_id]
        room = self.context_length - len(first) - 1
        out = np.full((len(cleaned), self.context_length), self.pad_id, np.int32)
        for row, inner in zip(out, encoded, strict=True):
            ids = [*first, *inner[:room], self.eos_id]
            row[: len(ids)] = ids
        return out

    def _encode_literal(self, text: str) -> list[int]:
        """Encode like OpenAI's pattern: a special token counts if a word could begin there, not after punctuation."""
        pattern = regex.compile("|".join([*map(regex.escape, self.literal), CLIP_WORDS]))
        ids, start = [], 0
        for match in pattern.finditer(text):
            if match[0] in self.literal:
                ids += self.backend.encode(text[start:match.start()], add_special_tokens=False).ids
                ids.append(self.backend.token_to_id(match[0]))
                start = match.end()
        return ids + self.backend.encode(text[start:], add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int32[np.ndarray, " t"]) -> str:
        """Decode one row of ids, up to its first `eos_id`, without special tokens."""
        ids = [int(i) for i in ids]
        if ids and ids[0] == self.bos_id:
            ids = ids[1:]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        else:      # it was cut before its end; trailing padding means nothing
            while ids and ids[-1] == self.pad_id:
                ids.pop()
        return self.backend.decode(ids, skip_special_tokens=True).strip()

    def at_length(self, length: int) -> "Tokenizer":
        """Return a copy with another `context_length`; other threads may use this one."""
        return _rebuild(self.backend.to_str(), self._settings() | {"context_length": length})

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint(self) -> str:
        """A digest of everything that determines the ids of a text."""
        return digest([self.backend.to_str().encode(), json.dumps(self._settings()).encode()])

    def _settings(self) -> dict[str, Any]:
        names = ("context_length", "pad_id", "bos_id", "eos_id", "cleaning", "literal")
        return {name: getattr(self, name) for name in names}

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` (as the `tokenizers` library does) and `tokenizer_settings.json` into `folder`."""
        folder = user_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=False), encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(self._settings(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer that `save` wrote."""
        folder = local_copy(user_path(folder))
        try:
            settings = json.loads((folder / SETTINGS).read_text())
            settings["literal"] = tuple(settings["literal"])
            return cls(_from_json(folder / "tokenizer.json"), **settings)
        except Exception as error:      # the library raises bare Exceptions
            raise ValueError(f"{folder} has no tokenizer that `Tokenizer.save` wrote: {error}") from error

    def __reduce__(self):
        return _rebuild, (self.backend.to_str(), self._settings())


def _rebuild(backend: str, settings: dict[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(backend), **settings)


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str] | None = None) -> Tokenizer:
    """Return the tokenizer that `config` names. The kinds `train-*` are trained on `texts`, deterministically."""
    if config.kind.startswith("train-"):
        corpus = [_clean(text, 128 * config.context_length) for text in texts or ()]
        if not any(corpus):
            raise ConfigError(f"data.tokenizer.kind is {config.kind!r}, which learns from the training source's "
                              "texts, and that has none; name a published tokenizer, or a source with texts")
        train = _train_wordpiece if config.kind == "train-wordpiece" else _train_bpe
        backend, special = train(corpus, config.vocab_size), {"pad_id": 0, "bos_id": 2, "eos_id": 3}
    else:
        path = local_copy(user_path(config.file or "", "data.tokenizer.file"))
        read: Callable = {"clip": read_clip, "bert": read_bert, "file": read_file}[config.kind]
        try:
            backend, special = read(path)
        except Exception as error:      # the library raises bare Exceptions
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"data.tokenizer.file is {config.file!r}; expected a file for kind {config.kind!r}, but "
                              f"reading it failed: {reason}") from error
    return Tokenizer(backend, config.context_length, **special, cleaning="openai" if config.kind == "clip" else "none")


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _clean(text: str, limit: int, cleaning: Cleaning = "none") -> str:
    if len(text) > limit:
        text = " ".join(text[: 8 * limit].split())[:limit]
    if not text.isascii():      # a lone surrogate cannot be encoded
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if cleaning in ("openai", "whitespace", "canonical"):
        from ftfy import fix_text  # imported by what cleans text only

        text = html.unescape(html.unescape(fix_text(text)))
    if cleaning == "canonical":
        text = text.replace("_", " ")
    if cleaning not in ("none", "whitespace"):
        text = text.lower()
    if cleaning in ("canonical", "siglip"):
        text = text.translate(_PUNCTUATION)
    return text if cleaning in ("none", "lower") else re.sub(r"\s+", " ", text).strip()


def read_clip(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Read OpenAI's merges, or a vocabulary and merges that were derived from them."""
    if path.is_dir() and (path / "vocab.json").exists():
        vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        merges = _merges((path / "merges.txt").read_text(encoding="utf-8"))
    elif path.is_dir() or path.suffix == ".json":
        file = path / "tokenizer.json" if path.is_dir() else path
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        vocab = model["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    else:
        data = path.read_bytes()
        merges = _merges((gzip.decompress(data) if path.suffix == ".gz" else data).decode())[:_CLIP_MERGES]
        if not merges:
            raise ValueError("it lists no merges")
        letters = _byte_letters()
        names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *CLIP_SPECIAL]
        vocab = {name: i for i, name in enumerate(names)}
    bos, eos = (vocab[name] for name in CLIP_SPECIAL)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    space = "\u0120"      # the byte letter of a space
    backend.decoder = decoders.Sequence([decoders.Replace("</w>", space), decoders.ByteLevel()])
    return backend, {"pad_id": 0, "bos_id": bos, "eos_id": eos}


def _merges(text: str) -> list[tuple[str, str]]:
    header, *lines = text.split("\n")
    if "version" not in header:
        lines.insert(0, header)
    return [(left, right) for left, right in (line.split() for line in lines if line.strip())]


def _byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte, printable bytes first: the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def read_bert(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """Read a vocabulary of BERT: WordPiece over lower-case words without accents."""
    names = path.read_text(encoding="utf-8").split("\n")
    vocab = {name.rstrip("\r"): i for i, name in enumerate(names) if name.rstrip("\r")}
    missing = [name for name in _BERT_SPECIAL if name not in vocab]
    if missing:
        raise ValueError(f"it has no line {', '.join(missing)}")
    return _wordpiece(vocab), {"pad_id": vocab["[PAD]"], "bos_id": vocab["[CLS]"], "eos_id": vocab["[SEP]"]}


def _wordpiece(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _from_json(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def read_file(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int | None]]:
    """Read any `tokenizer.json`; its begin and end tokens are those that it puts around a text."""
    backend = _from_json(path)
    padding = backend.padding
    backend.no_truncation()
    backend.no_padding()
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i:i + len(bare)] == bare]
    before, after = (full[:starts[0]], full[starts[0] + len(bare):]) if bare and starts else ([], [])
    if len(before) > 1 or len(after) > 1:
        raise ValueError(f"it puts the ids {before} and {after} around a text; expected at most one before and after")

    def known(*names: str) -> int | None:
        return next((i for name in names if (i := backend.token_to_id(name)) is not None), None)

    eos = after[0] if after else known("</s>", "[SEP]", "<|endoftext|>", "<eos>", "<|im_end|>")
    if eos is None:
        raise ValueError("it has no end token")
    pad = padding["pad_id"] if padding else known("[PAD]", "<pad>", "<|pad|>")
    return backend, {"pad_id": eos if pad is None else pad, "bos_id": before[0] if before else None, "eos_id": eos}


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, int | None]]:
    """Read a `.model` of the SentencePiece library with the Unigram algorithm (T5, SigLIP)."""
    from sentencepiece import sentencepiece_model_pb2 as protocol
    proto = protocol.ModelProto.FromString(path.read_bytes())
    if proto.trainer_spec.model_type != protocol.TrainerSpec.UNIGRAM:
        raise ValueError("its algorithm is not Unigram")
    names = [piece.piece for piece in proto.pieces]
    backend = tokenizers.Tokenizer(models.Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces], unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback))
    steps = [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
    if table := proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(table))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special = protocol.ModelProto.SentencePiece.CONTROL
    backend.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == special])
    eos = names.index("</s>")
    return backend, {"pad_id": eos, "bos_id": None, "eos_id": eos}


def _train_wordpiece(corpus: list[str], size: int) -> tokenizers.Tokenizer:
    backend = _wordpiece({"[UNK]": 0})
    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(backend.normalizer.normalize_str(text))
    ordered = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    letters = sorted(ordered[: (size - len(_BERT_SPECIAL)) // 3])      # rarer ones become [UNK]
    # The trainer numbers "##" letters in the order of a hash map unless they are special tokens.
    fixed = [*_BERT_SPECIAL, *("##" + c for c in letters)]
    backend.train_from_iterator(corpus, trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=fixed, initial_alphabet=letters, limit_alphabet=len(letters),
        show_progress=False))
    return _wordpiece(backend.get_vocab(with_added_tokens=True))


def _train_bpe(corpus: list[str], size: int) -> tokenizers.Tokenizer:
    """Train BPE over bytes, so that nothing is unknown; it needs a vocabulary of 260 or more."""
    if size < 256 + len(_BERT_SPECIAL):
        raise ConfigError(f"data.tokenizer.vocab_size is {size}; expected 260 or more for kind 'train-bpe'")

    def around(model: models.Model) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        return backend

    backend = around(models.BPE())
    backend.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_BERT_SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    model = json.loads(backend.to_str())["model"]
    return around(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))
