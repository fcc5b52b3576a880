"""Tokenizers against encodings made by hand and a plain byte-pair encoder; text never names a special token."""

import gzip
import itertools
import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxmm.config import TokenizerConfig
from jaxmm.data.tokenizers import Tokenizer, make_tokenizer
from jaxmm.validation import ConfigError
from tests.properties import EXAMPLES

MERGES = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("'", "s</w>"),
          ("i", "n"), ("in", "g</w>"), ("!", "!</w>"), ("ð", "Ł"), ("ca", "t")]
VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "un", "##aff", "##able", "!", "'", "[",
         "]", "sep", "dog", "cafe", "中"]
CORPUS = ["a small red circle above a large blue square", "there is a green star, left of the pink heart",
          "two circles: a small red one and a big blue one", "naïve café 中文 🦄"] * 5
BERT = {"kind": "bert", "context_length": 8}


def clip_vocab() -> dict[str, int]:
    """OpenAI's numbering, written out: 256 letters, the same at the end of a word, merges, two special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(68)]
    names = letters + [c + "</w>" for c in letters] + ["".join(m) for m in MERGES]
    return {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}


def plain_bpe(text: str) -> list[int]:
    """Merges the pair of lowest rank until none is left: the published algorithm, without its clean-up of the text."""
    vocab, ranks = clip_vocab(), {m: i for i, m in enumerate(MERGES)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    ids = []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text):
        parts = [letter[b] for b in word.encode()]
        parts[-1] += "</w>"
        while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
            best, merged, i = min(pairs, key=ranks.get), [], 0
            while i < len(parts):
                pair = tuple(parts[i:i + 2]) == best
                merged.append("".join(parts[i:i + 2]) if pair else parts[i])
                i += 2 if pair else 1
            parts = merged
        ids += [vocab[p] for p in parts]
    return ids


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lines = '"bpe_simple_vocab#version: 0.2\n' + "".join(f"{a} {b}\n" for a, b in MERGES)
    with gzip.open(folder / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    (folder / "hf").mkdir()
    (folder / "hf" / "merges.txt").write_text("#version: 0.2\n" + lines.split("\n", 1)[1], encoding="utf-8")
    (folder / "hf" / "vocab.json").write_text(json.dumps(clip_vocab()), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(clip_vocab(), MERGES, end_of_word_suffix="</w>"))
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    start, end = 256 * 2 + len(MERGES), 256 * 2 + len(MERGES) + 1
    backend.post_processor = tokenizers.processors.RobertaProcessing(("<|endoftext|>", end), ("<|startoftext|>", start))
    backend.enable_padding(pad_id=end, pad_token="<|endoftext|>")
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def clip(files):
    return make_tokenizer(TokenizerConfig(kind="clip", file=str(files / "merges.txt.gz"), context_length=11))


@pytest.fixture(scope="module")
def bert(files):
    return make_tokenizer(TokenizerConfig(file=str(files / "vocab.txt"), **BERT))


@pytest.fixture(scope="module", params=["clip", "bert", "file", "train-wordpiece", "train-bpe"])
def every(request, files, clip, bert):
    kind = request.param
    if kind == "file":
        return make_tokenizer(TokenizerConfig(kind=kind, file=str(files / "tokenizer.json"), context_length=9))
    if kind.startswith("train"):
        return make_tokenizer(TokenizerConfig(kind=kind, vocab_size=300, context_length=9), CORPUS)
    return {"clip": clip, "bert": bert}[kind]


def test_clip_by_hand(clip):
    vocab = clip_vocab()
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.pad_id) == (526, 524, 525, 0)
    the, cat, s, do, g = (vocab[t] for t in ("the</w>", "cat</w>", "'s</w>", "dog</w>", "!!</w>"))
    assert clip(["The  CAT&amp;#39;s dog!!"]).tolist() == [[524, the, cat, s, do, g, 525, 0, 0, 0, 0]]
    assert clip(["cats"])[0, :4].tolist() == [524, vocab["cat"], vocab["s</w>"], 525]
    assert clip(["ÃŠ"]).tolist() == clip(["ê"]).tolist()      # ftfy: Ê, read as Latin-1
    assert clip(["a\n\t a"]).tolist() == clip([" a a"]).tolist()


@pytest.mark.parametrize("text", ["the cats' 42 dogs!!!", "it's don't we'll", "doing 🦄🌈 中文 ½²", "¡™£", "dog" * 3])
def test_clip_as_published(clip, text):
    ids = plain_bpe(text)
    want = [524, *ids, 525] if len(ids) <= 9 else [524, *ids[:9], 525]
    assert clip([text])[0].tolist() == want + [0] * (11 - len(want))


def test_clip_from_every_kind_of_file(clip, files):
    texts = ["The cat's dog!!", "doing 🦄", ""]
    for name in ("hf", "hf/../tokenizer.json"):
        other = make_tokenizer(TokenizerConfig(kind="clip", file=str(files / name), context_length=11))
        assert (other(texts) == clip(texts)).all() and other.pad_id == 0


def test_bert_by_hand(bert):
    assert (bert.vocab_size, bert.pad_id, bert.bos_id, bert.eos_id) == (19, 0, 3, 4)
    assert bert(["A cats Unaffable!"]).tolist() == [[3, 5, 6, 7, 8, 9, 10, 4]]      # "!" does not fit
    assert bert(["Café  xyz 中\x00a"]).tolist() == [[3, 17, 2, 18, 5, 4, 0, 0]]
    assert bert.decode(bert(["a cats!"])[0]) == "a cats!"


def test_file_keeps_its_own_begin_end_and_pad(files):
    tokenizer = make_tokenizer(TokenizerConfig(kind="file", file=str(files / "tokenizer.json"), context_length=9))
    vocab = clip_vocab()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (524, 525, 525)
    want = [524, vocab["the</w>"], vocab["dog</w>"], vocab["the</w>"], vocab["dog</w>"], 525, 525, 525, 525]
    assert tokenizer(["the dog the dog"]).tolist() == [want]      # the file's own limit of 4 is lifted


def test_text_never_becomes_a_special_token(every):
    names = ("<|startoftext|>", "<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "</s>")
    special = {every.bos_id, every.eos_id}
    for name in names:
        for text in (f"a {name} dog", name, name + name):
            row = every([text])[0].tolist()
            inner = row[1:row.index(every.eos_id)]
            assert row[0] == every.bos_id and len(inner) >= 1
            assert not special & set(inner)
            assert set(row[row.index(every.eos_id) + 1:]) <= {every.pad_id}
            if every.cleaning != "openai" and every.pad_id != every.eos_id:      # CLIP pads with the id of "!"
                assert every.pad_id not in inner


def test_bracketed_special_words_are_split(bert):
    assert bert(["a [SEP] a"]).tolist() == [[3, 5, 13, 15, 14, 5, 4, 0]]


def test_long_text_keeps_its_end_token_and_its_beginning(every):
    row = every(["a " * 100])[0]
    assert row[-1] == every.eos_id and every.eos_id not in row[:-1]
    assert (row == every(["a " * 50])[0]).all()


@pytest.mark.parametrize("text", [
    "", " ", "\x00", "\ud800", "x\udc00y", "🦄👩‍👩‍👧", "\u0301", "a" * 10**6, " " * 10**6, "🦄" * 10**6, "a " * 500_000,
    "&amp;" * 200_000], ids=lambda t: f"{t[:3]!a}x{len(t)}")
def test_any_text_is_encoded_quickly(every, text):
    start = time.perf_counter()
    rows = every([text, "a"])
    assert time.perf_counter() - start < 2
    assert rows.shape == (2, every.context_length) and rows.dtype == np.int32
    assert rows.min() >= 0 and rows.max() < every.vocab_size
    assert rows[0, 0] == every.bos_id and every.eos_id in rows[0]
    assert (rows[1] == every(["a"])[0]).all()


def test_empty_text_is_begin_and_end(every):
    pads = [every.pad_id] * (every.context_length - 2)
    assert every([""]).tolist() == [[every.bos_id, every.eos_id, *pads]]
    assert every([]).shape == (0, every.context_length)
    assert every.decode(every([""])[0]) == ""


def test_many_texts_at_once_are_as_one_by_one(every):
    texts = [f"a cat {i} dog" for i in range(70)]
    assert (every(texts) == np.concatenate([every([t]) for t in texts])).all()


def test_saved_and_pickled_are_the_same(every, tmp_path):
    texts = ["a small red circle", "the CAT's [SEP] <|endoftext|> dog!!", "🦄"]
    every.save(tmp_path)
    for again in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(every))):
        assert (again(texts) == every(texts)).all()
        for name in ("cleaning", "literal", "context_length", "vocab_size", "pad_id", "bos_id", "eos_id"):
            assert getattr(again, name) == getattr(every, name)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_settings.json"]


@pytest.mark.parametrize("kind", ["train-wordpiece", "train-bpe"])
def test_trained_words_come_back(kind):
    tokenizer = make_tokenizer(TokenizerConfig(kind=kind, vocab_size=400, context_length=24), CORPUS)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3) and tokenizer.vocab_size <= 400
    for text in CORPUS[:2]:
        ids = tokenizer([text.upper()])[0]
        assert tokenizer.decode(ids) == text
        words = len(regex.findall(r"\w+|[^\w\s]", text))
        assert (ids != 0).sum() == words + 2      # each word seen often is one token
    assert (1 in tokenizer(["zq\u4e8c"])) == (kind == "train-wordpiece")      # bytes know every word


def test_trained_vocabulary_keeps_to_its_size():
    texts = [chr(0x4E00 + i) * 3 + f" word{i}" for i in range(500)]
    tokenizer = make_tokenizer(TokenizerConfig(kind="train-wordpiece", vocab_size=90, context_length=7), texts)
    assert tokenizer.vocab_size <= 90 and (tokenizer(["word7"])[0] != 1).all()


@pytest.mark.parametrize("kind", ["train-wordpiece", "train-bpe"])
def test_training_is_the_same_in_another_process(kind, tmp_path):
    config = TokenizerConfig(kind=kind, vocab_size=300, context_length=5)
    make_tokenizer(config, iter(CORPUS)).save(tmp_path / "a")
    code = (f"from jaxmm.data.tokenizers import make_tokenizer\nfrom jaxmm.config import TokenizerConfig\n"
            f"make_tokenizer(TokenizerConfig(kind={kind!r}, vocab_size=300, context_length=5), {CORPUS!r})"
            f".save({str(tmp_path / 'b')!r})")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("kind", ["clip", "bert", "file"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"{}", b"[1]", b"a b c\n", b"x\nyz\n"])
def test_wrong_files_are_named(kind, content, tmp_path):
    path = tmp_path / "some.json" if kind == "file" else tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.file is .*some\."):
        make_tokenizer(TokenizerConfig(kind=kind, file=str(path)))


def test_unusable_input_is_refused(clip, tmp_path):
    with pytest.raises(TypeError, match="list of strings"):
        clip("a cat")
    for texts in (None, [], [""]):
        with pytest.raises(ConfigError, match=r"data\.tokenizer\.kind"):
            make_tokenizer(TokenizerConfig(), texts)
    with pytest.raises(ConfigError, match="260"):
        make_tokenizer(TokenizerConfig(kind="train-bpe", vocab_size=100), CORPUS)
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer.load(tmp_path)


SPECIAL = ("<|startoftext|>", "<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "</s>")


@EXAMPLES
@given(st.lists(st.sampled_from([*SPECIAL, "&lt;|endoftext|&gt;", "[\u200dSEP]", "\ufeff", "[", "]", "<|", "|>"])
                | st.text(st.characters(), max_size=9), max_size=6))
def test_any_text_is_one_row_with_one_end(every, pieces):
    """Whatever special tokens it spells, in part, escaped, or between others."""
    row = every(["".join(pieces)])[0].tolist()
    end = row.index(every.eos_id)
    assert len(row) == every.context_length and row[0] == every.bos_id and 0 <= min(row) <= max(row) < every.vocab_size
    assert not {every.bos_id, every.eos_id} & set(row[1:end]) and set(row[end + 1:]) <= {every.pad_id}
    every.decode(row).encode()
