"""Token ids against the published tokenizers, on 5,000 strings as people and machines write them."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers

from jaxmm.pretrained.io.hub import Files
from jaxmm.pretrained.tokenizer import clip_vocabulary, file_vocabulary, openai_vocabulary, read_tokenizer

pytestmark = pytest.mark.parity
PIECES = {
    "words": ["a", "photo", "of", "the", "small", "dogs", "cats,", "sitting", "in", "1999", "it's", "don't", "we'll",
              "THEY'RE", "CamelCase"],
    "accents": ["café", "naïve", "Ångström", "é", "İstanbul", "straße", "ﬁne", "ŒUVRE", "Ñandú", "Å", "ǅ"],
    "emoji": ["🦄", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "❤️", "👍🏽", "☃", "⚡️"],
    "cjk": ["中文", "日本語テキスト", "한국어", "㈱", "ｆｕｌｌ", "１２３"],
    "right to left": ["שלום", "مرحبا", "\u202eabc\u202c", "ﷺ"],
    "controls": ["\x00", "\x07", "\x1b[0m", "\u200b", "\ufeff", "\x85", "\u2028", "\t\n", "\x1c", "\xad"],
    "special": ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>", "</s>", "<pad>", "[SEP]"],
    "entities": ["&amp;", "&lt;b&gt;", "&amp;amp;", "&#39;", "&nbsp;", "&", "&#x1F600;"],
    "mojibake": ["Ã©", "â€™", "Â ", "l’été", "“quoted”"],
    "marks": ["!!!", "...", "'", "''s", "'S", "_", "-", "½²", "§¶", "$5.00", "#tag", "@me", "~`^"],
}


def strings(count=5000, seed=0):
    """Mixtures of all kinds, a few empty, of one character, or of 10,000."""
    rng = random.Random(seed)
    texts = ["", " ", "a", "a" * 10_000, "word " * 2000, "中" * 10_000, "🦄" * 2500, "<|endoftext|>" * 100]
    texts += [chr(rng.choice([c for c in range(0x20, 0x3000) if unicodedata.category(chr(c)) != "Cn"]))
              for _ in range(400)]
    while len(texts) < count:
        kinds = rng.sample(list(PIECES), rng.randint(1, 3))
        parts = [rng.choice(PIECES[rng.choice(kinds)]) for _ in range(rng.randint(1, 12))]
        texts.append(rng.choice(["", " ", " ", "  "]).join(parts))
    return texts


def same(ours, theirs, texts, name, record_property):
    """Check that all rows of ids are the same, and print the first three that differ."""
    different = np.flatnonzero((ours != theirs).any(axis=1))
    record_property(f"{name}, texts with other ids", f"{len(different)} of {len(texts)}")
    for i in different[:3]:
        print(f"{texts[i][:80]!r}\n  ours   {ours[i].tolist()}\n  theirs {theirs[i].tolist()}")
    assert not len(different)


@pytest.fixture(scope="module")
def merges():
    module = pytest.importorskip("open_clip.tokenizer", reason="no extra names open_clip, which holds CLIP's merges")
    return module.default_bpe()


def read(folder, vocabulary):
    return read_tokenizer(Files(str(folder), folder, folder / "model.safetensors"), vocabulary)


def test_open_clip(merges, tmp_path, record_property):
    open_clip = pytest.importorskip("open_clip", reason="as for the merges")
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(Path(merges).read_bytes())
    ours = read(tmp_path, openai_vocabulary(77, ("<start_of_text>", "<end_of_text>")))
    texts = strings()
    same(ours(texts), open_clip.tokenizer.SimpleTokenizer()(texts).numpy(), texts, "open_clip", record_property)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_transformers_clip(merges, form, tmp_path, record_property):
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(Path(merges).read_bytes())
    backend = read(tmp_path, openai_vocabulary(77)).backend
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    model = json.loads(backend.to_str())["model"]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    theirs.save_pretrained(tmp_path)
    if form == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    ours = read(tmp_path, clip_vocabulary(77))
    texts = [text for text in strings() if text]
    want = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")["input_ids"]
    same(ours(texts), want, texts, f"transformers CLIP from {form}", record_property)


def vocabulary(size=300):
    """A small byte-pair vocabulary, with what SigLIP's and Gemma's have besides."""
    words = sorted({word for pieces in PIECES.values() for word in pieces if not word.startswith("<")})
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False,
        special_tokens=["<pad>", "</s>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))])
    backend.train_from_iterator([word.lower() for word in words], trainer)
    return backend


@pytest.fixture
def siglip(tmp_path):
    """A small vocabulary of the SentencePiece library, numbered as T5's."""
    words = sorted({word for pieces in PIECES.values() for word in pieces if not word.startswith("<")})
    sentences = [" ".join(words[i:] + words[:i]).lower() for i in range(len(words))] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "spiece"), vocab_size=400, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, character_coverage=0.98, minloglevel=2, hard_vocab_limit=False)
    (tmp_path / "spiece.vocab").unlink()
    return tmp_path


def test_siglip(siglip, record_property):
    """Lower case without punctuation, padded to 64 with the end token."""
    theirs = transformers.SiglipTokenizer(str(siglip / "spiece.model"))
    ours = read(siglip, file_vocabulary(64, "siglip"))
    assert (ours.pad_id, ours.eos_id) == (1, 1)
    # transformers' begins an empty text, and one that begins with white space, with a mark that the model never saw
    texts = [text.strip() for text in strings(12_000) if "</s>" not in text and "<pad>" not in text]
    texts = [text for text in texts if text[:1].isalnum()]
    assert len(texts) >= 5000
    want = theirs(texts, padding="max_length", truncation=True, max_length=64, return_tensors="np")["input_ids"]
    same(ours(texts), want, texts, "SigLIP", record_property)


def test_siglip_2(tmp_path, record_property):
    model = json.loads(vocabulary().to_str())["model"]
    theirs = transformers.Siglip2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
                                           eos_token="</s>", add_eos_token=True, padding_side="right")
    theirs.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path, file_vocabulary(64, "lower"))
    texts = strings()
    want = theirs(texts, padding="max_length", truncation=True, max_length=64, return_tensors="np")["input_ids"]
    same(ours(texts), want, texts, "SigLIP 2", record_property)
