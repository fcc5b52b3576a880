"""Questions and answers: every layout, faults of files, and the arrays of a batch."""

import json
import pickle

import numpy as np
import pytest

from jaxmm.config import DataConfig, ImageConfig, TokenizerConfig
from jaxmm.data.bad_records import REASONS, FaultCounter
from jaxmm.data.base import DataError, record_texts
from jaxmm.data.eval_pipeline import eval_batches
from jaxmm.data.pipeline import train_batches
from jaxmm.data.rows import image_id
from jaxmm.data.sources.registry import open_source
from jaxmm.data.sources.vqa import answer_shares, clean_question, common_answers
from jaxmm.data.tokenizers import make_tokenizer
from jaxmm.data.tools.checking import check
from tests.data.test_sources import png, write

ROWS = [{"image": "p/1.png", "question": "What is #1?", "answers": ["a cat", "cat", "a cat"]},
        {"image": "p/2.png", "question": "Is it (red)?", "answer": "yes"},
        {"image": "p/1.png", "question": "How many?", "answer": 3},
        {"image": "p/2.png", "question": "Why?"}]


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"p/{number}.png", png(number))
    return tmp_path


@pytest.fixture
def source(folder):
    return open_source(f"vqa:{write(folder / 'qa.json', json.dumps(ROWS))}")


def test_list_and_lines(source, folder):
    lines = open_source(f"vqa:{write(folder / 'qa.jsonl', chr(10).join(map(json.dumps, ROWS)))}")
    for opened in (source, lines, pickle.loads(pickle.dumps(source))):
        assert [(opened[i]["question"], opened[i]["answers"], opened[i]["image"]) for i in range(4)] == [
            ("what is 1?", ("a cat", "cat", "a cat"), png(1)), ("is it red?", ("yes",), png(2)),
            ("how many?", ("3",), png(1)), ("why?", (), png(2))]
        assert "texts" not in opened[0] and opened.most_answers == 2 and opened.classes is None
    assert record_texts(source, 0) == ("what is 1?", "a cat", "cat")
    assert len({source.key(i) for i in range(4)}) == 4 and source.key(1).startswith("p/2.png")
    np.testing.assert_array_equal(image_id(source[0]), image_id(source[2]))
    assert (image_id(source[0]) != image_id(source[1])).any()
    assert open_source(source.name).fingerprint == source.fingerprint != lines.fingerprint
    one = open_source(f"vqa:{write(folder / 'one.jsonl', json.dumps(ROWS[0]))}")
    assert len(one) == 1 and one[0]["answers"] == tuple(ROWS[0]["answers"])
    assert common_answers(source, 2) == ["a cat", "cat"] and len(common_answers(source, 9)) == 4


def test_easy_vqa(tmp_path):
    write(tmp_path / "questions.json", '[["what is it?", "circle", 7], ["is it Red?", "no", 0]]')
    for number in (0, 7):
        write(tmp_path / f"images/{number}.png", png(number))
    source = open_source(f"vqa:{tmp_path}")
    assert [(r["question"], r["answers"], r["image"], r["image_id"]) for r in (source[0], source[1])] == [
        ("what is it?", ("circle",), png(7), "7"), ("is it red?", ("no",), png(0), "0")]


@pytest.mark.parametrize("names", [
    ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
    ("questions.json", "annotations.json")])
@pytest.mark.parametrize("picture", ["val2014/COCO_val2014_{:012d}.jpg", "images/{:012d}.jpg"])
def test_vqav2(names, picture, tmp_path):
    questions = {"data_subtype": "val2014", "questions": [
        {"question_id": 90, "image_id": 9, "question": "One?"}, {"question_id": 41, "image_id": 4, "question": "Two?"},
        {"question_id": 42, "image_id": 4, "question": "Three?"}]}
    annotations = {"data_subtype": "val2014", "annotations": [
        {"question_id": 41, "image_id": 4, "answers": [{"answer": "x", "answer_id": 1}, {"answer": "y"}]},
        {"question_id": 90, "image_id": 9, "answers": [{"answer": "z"}] * 10}]}
    for name, content in zip(names, (questions, annotations), strict=True):
        write(tmp_path / "vqa" / name, json.dumps(content))
    for number in (4, 9):
        write(tmp_path / picture.format(number), png(number))
    one, other = (open_source(f"vqa:{tmp_path}/vqa/{name}") for name in names)
    for source in (one, other):
        records = [source[i] for i in range(3)]
        assert [(r["question"], r["answers"], r["image"], r["image_id"]) for r in records] == [
            ("one?", ("z",) * 10, png(9), "9"), ("two?", ("x", "y"), png(4), "4"), ("three?", (), png(4), "4")]
        assert [r["question_id"] for r in records] == [90, 41, 42]
    (tmp_path / "vqa" / names[1]).unlink()
    alone = open_source(f"vqa:{tmp_path}/vqa/{names[0]}")
    assert alone.most_answers == 0 and alone[1]["answers"] == ()


def test_blip_lists_find_their_images_in_the_folder_beside(tmp_path):
    rows = [{"question": "What?", "answer": ["a", "b"], "image": "val2014/1.jpg", "question_id": 5, "dataset": "vqa"}]
    write(tmp_path / "coco/val2014/1.jpg", png(1))
    source = open_source(f"vqa:{write(tmp_path / 'lists/vqa_train.json', json.dumps(rows))}")
    assert source[0]["image"] == png(1) and source[0]["answers"] == ("a", "b")


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "[1,", r"a\.json:1 is not JSON"),
    ("a.jsonl", '{"image": "x", "question": "y"}\n{"image"', r"a\.jsonl:2 is not JSON"),
    ("a.json", "5", "is int; expected objects"),
    ("a.json", "[]", "is empty"),
    ("a.json", '[{"image": "x"}]', "entry 0 names no image or has no question; expected an object with `image`"),
    ("a.json", '{"questions": [{"image_id": 1, "question": "y"}], "annotations": [{"question_id": 1}]}',
     "not VQAv2's layout .*'question_id'"),
    ("a.json", '{"questions": [{"image_id": 1, "question": "y", "question_id": 3}],"annotations": [{"question_id":1}]}',
     "no `question_id` of its 1 annotations, such as '1', is that of a question, such as '3'"),
    ("a.json", '{"answers": []}', "has 'answers'; expected `questions`, `annotations`, `data`, or a list"),
    ("a.json", '{"questions": [{"image_id": 1, "question": "y", "question_id": 2}]}', "_000000000001.jpg', the first"),
    ("v2_mscoco_val2014_annotations.json", '{"annotations": []}', "v2_OpenEnded_mscoco_val2014_questions.json"),
    ("b/questions.json", '[["a", "b"]]', r"entry 0 is \['a', 'b'\]; expected \[question"),
    ("b/other.json", "[]", "no questions.json in the folder")])
def test_bad_files(name, content, message, tmp_path):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        open_source(f"vqa:{file.parent if name.startswith('b/') else file}")


def test_questions_are_cleaned_as_blip_does():
    assert clean_question('  Is "THE" cat (really): #1?!\n') == "is the cat really 1?"
    assert clean_question(" ".join(["w"] * 60)).split() == ["w"] * 50


def test_weights_are_shares_of_all_answers():
    assert answer_shares(["a", "b", "a", " ", "A"]) == [("a", 0.5), ("b", 0.25), ("A", 0.25)]
    assert answer_shares([""]) == []


def test_batches(source):
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=90), [text for i in range(4) for text in record_texts(
        source, i)]).at_length(11)
    config = DataConfig(batch_size=8, image=ImageConfig(size=6), max_bad=1.0,
                        tokenizer=TokenizerConfig(answer_length=5))
    batches = train_batches(source, config, tokenizer, seed=3)
    faults, answers = FaultCounter(source, max_bad=1.0), tokenizer.at_length(5)
    for _ in range(2):
        batch = next(batches)
        faults.update(batch)
        assert batch["answers"].shape == (8, 2, 5) and batch["answers"].dtype == np.int32
        assert batch["answer_weight"].dtype == np.float32
        for row, index in enumerate(batch["index"].tolist()):
            np.testing.assert_array_equal(batch["tokens"][row], tokenizer([source[index]["question"]])[0])
            shares = answer_shares(source[index]["answers"])
            np.testing.assert_allclose(batch["answer_weight"][row], [*(w for _, w in shares), 0, 0][:2], rtol=1e-6)
            np.testing.assert_array_equal(batch["answers"][row, :len(shares)], answers([text for text, _ in shares]))
            assert (batch["answers"][row, len(shares):] == tokenizer.pad_id).all()
    assert faults.counts == {"no answer": 4}      # each record four times, one of the four has none
    batches.close()
    [batch] = eval_batches(source, config, 5, tokenizer)
    assert batch["mask"].tolist() == [True] * 4 + [False] and "answers" not in batch
    np.testing.assert_array_equal(batch["tokens"][3], tokenizer(["why?"])[0])
    assert batch["fault"].sum() == 0 and "no answer" in REASONS


def test_several_questions_of_a_image(folder):
    """The drawn question, then others about the same image that have answers, each once if there are enough."""
    rows = [{"image": "p/1.png", "question": f"which {i}?", "answers": [f"a{i}", "b"]} for i in range(4)]
    source = open_source(f"vqa:{write(folder / 'many.json', json.dumps(rows + ROWS[1:2] + ROWS[3:]))}")
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=90), [text for i in range(6) for text in record_texts(
        source, i)]).at_length(11)
    config = DataConfig(batch_size=6, questions=3, image=ImageConfig(size=6), max_bad=1.0,
                        tokenizer=TokenizerConfig(answer_length=5))
    triples, batches = set(), train_batches(source, config, tokenizer, seed=3)
    for _, batch in zip(range(8), batches, strict=False):
        assert batch["tokens"].shape == (6, 3, 11) and batch["answers"].shape == (6, 3, 2, 5)
        assert batch["image"].shape[0] == 6 and batch["answer_weight"].shape == (6, 3, 2)
        for row, index in enumerate(batch["index"].tolist()):
            asked = [tokenizer.decode(ids) for ids in batch["tokens"][row]]
            assert asked[0] == tokenizer.decode(tokenizer([source[index]["question"]])[0])
            if index < 4:
                assert len(set(asked)) == 3 and all("which" in question for question in asked)
                triples.add(tuple(asked))
                decoded = [tokenizer.decode(answers[0]) for answers in batch["answers"][row]]
                assert [answer[-1] for answer in decoded] == [question.rstrip(" ?")[-1] for question in asked]
            else:
                assert asked == ["is it red?"] * 3
    assert len(triples) > 12
    batches.close()


PUBLISHED = {
    "VizWiz": ({"val.json": [{"image": "VizWiz_val_7.jpg", "question": "What is this?", "answerable": 1, "answers": [
        {"answer": "a can", "answer_confidence": "yes"}, {"answer": "can", "answer_confidence": "no"}]}]},
        "val/VizWiz_val_7.jpg", ("a can", "can")),
    "GQA": ({"val.json": {"201307251": {"imageId": "2354786", "question": "What is this?", "answer": "yes",
                                        "fullAnswer": "Yes, it is."}}}, "images/2354786.jpg", ("yes",)),
    "TextVQA": ({"val.json": {"dataset_type": "val", "data": [
        {"image_id": "003a8ae2ef43b901", "question": "What is this?", "answers": ["nous", "dakota"], "question_id": 3,
         "image_classes": ["Belt"]}]}}, "train_val_images/003a8ae2ef43b901.jpg", ("nous", "dakota")),
    "A-OKVQA": ({"val.json": [{"split": "val", "image_id": 299207, "question": "What is this?", "choices": ["a", "cab"],
                               "correct_choice_idx": 1, "direct_answers": ["ride", "ride", "taxi"]}]},
                "val2017/000000299207.jpg", ("ride", "ride", "taxi")),
    "A-OKVQA, choices alone": ({"val.json": [{"image_id": 299207, "question": "What is this?", "choices": ["a", "cab"],
                                              "correct_choice_idx": 1}]}, "val2017/000000299207.jpg", ("cab",)),
    "OK-VQA": ({"val.json": {"questions": [{"image_id": 42, "question": "What is this?", "question_id": "9"}],
                             "annotations": [{"question_id": 9, "answers": [{"raw_answer": "x", "answer": "race"}]}]}},
               "val2014/COCO_val2014_000000000042.jpg", ("race",)),
    "one answer": ({"val.json": {"questions": [{"image_id": 42, "question": "What is this?", "question_id": 9}],
                                 "annotations": [{"question_id": 9, "multiple_choice_answer": "red"}]}},
                   "val2014/COCO_val2014_000000000042.jpg", ("red",)),
    "CLEVR": ({"val.json": {"questions": [{"image_filename": "C_val_1.png", "question": "What is this?",
                                           "answer": "yes"}]}}, "images/val/C_val_1.png", ("yes",)),
    "Visual Genome": ({"val.json": [{"id": 61, "qas": [{"question": "What is this?", "answer": "A clock."}]}]},
                      "VG_100K/61.jpg", ("A clock.",)),
    "easy-VQA's file": ({"val.json": [["What is this?", "circle", 3]]}, "images/3.png", ("circle",)),
    "TSV": ({"val.tsv": "img_path\tquestion\tanswer\na/3.png\t\"What is\tthis?\"\t5\n"}, "a/3.png", ("5",)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_as_published(tmp_path, name):
    files, image, answers = PUBLISHED[name]
    for file, content in files.items():
        write(tmp_path / file, content if isinstance(content, str) else json.dumps(content))
    write(tmp_path / image, png(5))
    source = open_source(f"vqa:{tmp_path}/{next(iter(files))}")
    assert len(source) == 1 and source[0]["image"] == png(5)
    assert (source[0]["question"], source[0]["answers"]) == ("what is this?", answers)
    assert check(source)["usable"] == 1


def test_ids_of_questions_match_whatever_their_type(folder):
    questions = [{"question_id": str(i), "image_id": i, "question": f"q{i}?"} for i in range(1, 3)]
    answers = [{"question_id": i, "answers": [{"answer": text} for text in ("a", None, 3)]} for i in (2, 7)]
    file = write(folder / "a.json", json.dumps({"questions": questions, "annotations": answers}))
    source = open_source(f"vqa:{file}")
    assert source.answers(0) == () and source.answers(1) == ("a", "3") and source[1]["image"] == png(2)
    assert source.notes == ("1 of 2 annotations are of no question in the file",)
    assert check(source)["broken"] == {"no answer": 1}


def test_a_bad_row_is_one_bad_record(folder):
    rows = ['{"image": "p/1.png", "question": "a?", "answer": "x"}', '{"image": "p/1.png", "ques', '{"question": "b?"}',
            '{"image": "p/2.png", "question": "c?", "answer": [true, null]}', '{"image": "p/2.png", "question": ""}']
    source = open_source(f"vqa:{write(folder / 'a.jsonl', chr(10).join(rows))}")
    report = check(source)
    assert report["usable"] == 1 and report["broken"] == {"no text": 1, "no answer": 1, "malformed": 2}
    assert report["examples"]["malformed"] == ["a.jsonl:2#1", "a.jsonl:3#2"]
    batches = train_batches(source, DataConfig(batch_size=4, image=ImageConfig(size=6), max_bad=1.0), make_tokenizer(
        TokenizerConfig(vocab_size=90), ["a x"]).at_length(8), seed=0)
    assert next(batches)["index"].tolist() == [0] * 4
    batches.close()
