"""Tokenizers that come with checkpoints: found, read as published, written so that transformers reads them alike."""

import dataclasses
import gzip
import json

import pytest
import sentencepiece
import tokenizers

from jaxmm.config import TokenizerConfig
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.pretrained.io.files import FileError
from jaxmm.pretrained.io.hub import Files
from jaxmm.pretrained.tokenizer import (
    bert_vocabulary,
    clip_vocabulary,
    file_vocabulary,
    openai_vocabulary,
    read_tokenizer,
    tokenizer_files,
)
from tests.data.test_tokenizers import CORPUS, MERGES, clip_vocab

TEXTS = ["The  CAT's dog!!", "caf\u00e9 &amp; cats", "dog " * 40, "", "a<|endoftext|>cat", "<end_of_text>", "🦄 中文"]
BEGIN, END = 524, 525


@pytest.fixture
def folder(tmp_path):
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write('"bpe_simple_vocab#version: 0.2\n' + lines)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines, encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocab()), encoding="utf-8")
    return tmp_path


def read(folder, vocabulary, given=None):
    return read_tokenizer(Files(str(folder), folder, folder / "model.safetensors"), vocabulary, given)


def test_openai_s_rules_from_every_file(folder):
    vocabulary = openai_vocabulary(11)
    first = read(folder, vocabulary)
    assert (first.cleaning, first.pad_id, first.eos_id, first.literal) == (
        "openai", 0, END, ("<|startoftext|>", "<|endoftext|>"))
    published = make_tokenizer(TokenizerConfig(
        kind="clip", file=str(folder / "bpe_simple_vocab_16e6.txt.gz"), context_length=11))
    plain = [text for text in TEXTS if "<" not in text]
    assert (first(plain) == published(plain)).all()
    (folder / "bpe_simple_vocab_16e6.txt.gz").rename(folder / "elsewhere.gz")
    assert (read(folder, vocabulary)(TEXTS) == first(TEXTS)).all()
    assert (read(folder / "..", vocabulary, folder / "elsewhere.gz")(TEXTS) == first(TEXTS)).all()
    assert (read(folder / "..", vocabulary, folder)(TEXTS) == first(TEXTS)).all()


def test_special_tokens_in_a_text_are_what_the_family_calls_them(folder):
    vocab = clip_vocab()
    openai = read(folder, openai_vocabulary(11))
    open_clip = read(folder, openai_vocabulary(11, ("<start_of_text>", "<end_of_text>")))
    a, cat = vocab["a</w>"], vocab["cat</w>"]
    assert openai(["a<|endoftext|>cat"])[0, :5].tolist() == [BEGIN, a, END, cat, END]
    assert openai(["]<|endoftext|>"])[0, 1] != END      # the sign before it takes the bracket along
    assert open_clip(["a<end_of_text>cat"])[0, :5].tolist() == [BEGIN, a, END, cat, END]
    assert END not in openai(["a <end_of_text>"])[0, :4]
    assert END not in open_clip(["a <|endoftext|>"])[0, :4]


def test_a_caption_cannot_name_bert_s_special_tokens(tmp_path):
    """Neither through the list of words nor through the file of transformers, where they are added tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]
    words = ["[", "]", "pad", "sep", "dec", "enc", "cls", "a", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(special + words) + "\n")
    plain = read(tmp_path, bert_vocabulary(20))
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens(special)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    want = [2, 6, 10, 7, 6, 9, 7, 6, 8, 7, 6, 11, 7, 13, 14, 3, 0, 0, 0, 0]
    for tokenizer in (plain, read(tmp_path, bert_vocabulary(20))):
        assert tokenizer(["[DEC] [SEP] [PAD] [ENC] a cat"])[0].tolist() == want
        assert tokenizer.decode(want) == "[ dec ] [ sep ] [ pad ] [ enc ] a cat"


def test_transformers_rules_clean_less(folder):
    vocabulary = clip_vocabulary(11)
    tokenizer = read(folder, vocabulary)
    assert (tokenizer.cleaning, tokenizer.pad_id, tokenizer.eos_id) == ("none", END, END)
    openai = read(folder, openai_vocabulary(11))
    assert (tokenizer(["The  CAT's dog!!"]) == [[id if i < 7 else END for i, id in enumerate(row)] for row in
                                                openai(["The  CAT's dog!!"]).tolist()]).all()
    assert (tokenizer(["a &amp; a"])[0, 3] != openai(["a &amp; a"])[0, 3])
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert read(folder, vocabulary).pad_id == 0


@pytest.mark.parametrize("kind", ["clip", "train-wordpiece", "train-bpe"])
@pytest.mark.parametrize("cleaning", ["none", "openai", "siglip", "canonical", "lower", "whitespace"])
def test_saved_files_give_the_same_ids(folder, kind, cleaning):
    config = TokenizerConfig(kind=kind, file=str(folder / "merges.txt"), vocab_size=300, context_length=11)
    tokenizer = dataclasses.replace(make_tokenizer(config, CORPUS), cleaning=cleaning)
    out = folder / "out"
    out.mkdir()
    for name, text in tokenizer_files(tokenizer).items():
        (out / name).write_text(text, encoding="utf-8")
    again = read(out, file_vocabulary(11))
    texts = ["The CAT's dog!!", "caf\u00e9, cats_and dogs", "dog " * 40, "", "🦄 中文", "a small red circle"]
    want = tokenizer(texts)
    if kind == "clip":
        want[want == tokenizer.pad_id] = tokenizer.eos_id
        got = again(texts)
        got[got == tokenizer.pad_id] = tokenizer.eos_id
        assert (got == want).all()
    else:
        assert (again(texts) == want).all()
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))      # with what it puts around a text
    assert backend.encode("a dog").ids == again(["a dog"])[0].tolist()[:len(backend.encode("a dog").ids)]


def test_sentencepiece_models_are_read(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_prefix=str(tmp_path / "spiece"), vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = read(tmp_path, file_vocabulary(12, "siglip"))
    for text, clean in (("A small, RED circle!", "a small red circle"), ("  caf\u00e9  stars_2 ", "café stars2"),
                        ("", "")):
        ids = [*library.encode(clean)[:11], 1]
        assert ours([text])[0].tolist() == ids + [1] * (12 - len(ids))
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x03abc")
    with pytest.raises(FileError, match=r"spiece\.model holds no tokenizer"):
        read(tmp_path, file_vocabulary(11))


def test_none_is_none_and_broken_is_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert read(empty, openai_vocabulary(11)) is None
    with pytest.raises(FileError, match="does not exist"):
        read(empty, file_vocabulary(11), empty / "none.json")
    for name, vocabulary in (("tokenizer.json", file_vocabulary), ("tokenizer.json", clip_vocabulary),
                             ("vocab.json", openai_vocabulary)):
        (empty / name).write_text('{"model": 3}')
        with pytest.raises(FileError, match=f"{name} holds no tokenizer"):
            read(empty, vocabulary(11))
        (empty / name).unlink()
