"""Read questions about images with their answers, in the layouts of VQAv2, easy-VQA and BLIP."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint
from jaxmm.data.cleaning import TEXT_NAMES, texts_of
from jaxmm.data.sources.annotations import Row, normal_ids, read_json, read_rows
from jaxmm.data.sources.columns import NAMES, Columns, Location, read_location
from jaxmm.data.sources.files import Files
from jaxmm.data.sources.image_roots import find_root
from jaxmm.data.tokenizers import Tokenizer
from jaxmm.paths import exists, user_path

REMOVED = str.maketrans("", "", '.!"()*#:;~')
"""Characters that BLIP removes from questions."""
QUESTION_IDS = ("question_id", "questionId", "qid", "qa_id")
"""Names of the id of a question."""
WORDS = 50
"""The largest number of words of a question."""


@dataclass(frozen=True, kw_only=True)
class Questions(Source):
    """One record per question: images in files, everything else in memory."""

    name: str
    rows: Files
    """The images. The texts of each are its question, then the different answers."""
    answer_lists: Sequence[tuple[str, ...]] = field(repr=False)
    """All answers to each question, repeats counted."""
    most_answers: int
    """The largest number of different answers to one question."""
    question_ids: Sequence[int | str | None] = field(default=(), repr=False)
    """The id of each question in its file; empty: there are none."""
    fingerprint: str = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of the image."""
        record = self.rows[index]
        question, number = record.pop("texts")[0], self.question_ids[index] if self.question_ids else None
        return record | {"question": question, "answers": self.answers(index)} | (
            {} if number is None else {"question_id": number})

    @cached_property
    def _of_image(self) -> dict[str, np.ndarray]:
        """The records about each image that have answers, by image id."""
        records: dict[str, list[int]] = {}
        for index, image in enumerate(self.rows.image_ids):
            if any(answer.strip() for answer in self.answers(index)):
                records.setdefault(image, []).append(index)
        return {image: np.array(indices) for image, indices in records.items()}

    def others(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[str, ...]]]:
        """Draw `count` more questions about the image of a record, with all answers to each.

        If there are fewer, they repeat; if there are none, the record's own question does.
        """
        records = self._of_image.get(self.rows.image_ids[index], np.array([index]))
        records = rng.permutation(records[records != index]) if len(records) > 1 else records
        return [(self.texts(other)[0], self.answers(other)) for other in np.resize(records, count).tolist()]

    def key(self, index: int) -> str:
        """Return the file and the record number."""
        return self.rows.key(index)

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the question and its different answers."""
        return self.rows.texts(index)

    def answers(self, index: int) -> tuple[str, ...]:
        """Return all answers to the question, repeats counted."""
        return self.answer_lists[index]


def clean_question(text: str) -> str:
    """Return a question as BLIP reads it: lower case, without the characters `REMOVED`, at most `WORDS` words."""
    return " ".join(text.lower().translate(REMOVED).split()[:WORDS])


def answer_shares(answers: Iterable[str]) -> list[tuple[str, float]]:
    """Return the different answers that are not blank, in order, each with its share of all answers."""
    counts = Counter(answer for answer in answers if answer.strip())
    return [(answer, count / counts.total()) for answer, count in counts.items()]


def answer_arrays(rows: Sequence[Sequence[tuple[str, float]]], tokenizer: Tokenizer, most: int
                  ) -> dict[str, np.ndarray]:
    """Return `answers` int32 [b a t] and `answer_weight` float32 [b a] of questions with `answer_shares`; a = `most`.

    Padding has weight 0.
    """
    weights = np.zeros((len(rows), most), np.float32)
    tokens = np.full((len(rows), most, tokenizer.context_length), tokenizer.pad_id, np.int32)
    places = [(row, place) for row, answers in enumerate(rows) for place in range(len(answers))]
    for (row, place), ids in zip(places, tokenizer([rows[row][place][0] for row, place in places]), strict=True):
        tokens[row, place], weights[row, place] = ids, rows[row][place][1]
    return {"answers": tokens, "answer_weight": weights}


def common_answers(source: Source, limit: int) -> list[str]:
    """Return the `limit` most frequent answers of a source; equally frequent ones in order of occurrence."""
    counts = Counter(answer for index in range(len(source)) for answer in source.answers(index) if answer.strip())
    return [answer for answer, _ in counts.most_common(limit)]


def open_questions(spec: str, location: str, data_dir: str | None = None) -> Questions:
    """Open easy-VQA's folder, VQAv2's two files, the files of GQA, TextVQA, VizWiz and A-OKVQA, or a list of questions.

    A list is JSON, JSON lines, CSV or TSV, with names as in `columns`. A row that cannot be read is one bad record.
    Raises `DataError`.
    """
    place = read_location(spec, location, ("image", "image_id", "question", "answer"), exists=exists)
    path = user_path(place.path)
    if path.is_dir():
        path = path / "questions.json"
        if not path.is_file():
            raise DataError(f"source {spec!r}: no questions.json in the folder {place.path!r}")
    read = read_rows(spec, path, place.columns, ("image", "question"))
    rows, notes, texts = list(read.rows), list(read.notes), [read.text]
    split = _split(path.name, read.content)
    if isinstance(read.content, dict):
        rows, beside = _rows_of(spec, path, read.content, place.columns, notes)
        texts += beside
    questions = [_question(row, place.columns, split) for row in _expanded(rows)]
    return _questions(spec, path, place, questions, texts, notes)


@dataclass(frozen=True)
class _Question:
    images: Sequence[str]
    """The image file, in every form that its name may have."""
    text: str
    answers: tuple[str, ...]
    image_id: str
    fault: str | None = None
    question_id: int | str | None = None


def _question(row: Row, columns: Columns, split: str) -> _Question:
    value = row.value
    if value and all(map(str.isdecimal, value)):  # a list: of easy-VQA
        parts = list(value.values())
        value = {"question": parts[0], "answer": parts[1], "image": f"images/{parts[2]}.png", "image_id": parts[2]} if (
            len(parts) == 3 and isinstance(parts[0], str) and not isinstance(parts[1], (list, dict))) else None
        row = Row(row.place, value, f"is {parts!r:.80}; expected [question, answer, image number]")
    if value is None:
        return _Question(("",), "", (), row.place, row.fault)
    image, image_id = columns.get(value, "image"), columns.get(value, "image_id")
    questions = texts_of(columns.get(value, "question"))
    if isinstance(image, str) or (image_id is None and isinstance(image, int)):
        forms = [str(image).strip()]
    elif isinstance(image_id, (str, int)):
        forms = _names_of_id(str(image_id), split)
    else:
        forms = []
    if not forms or (not questions and not any(name in value for name in NAMES["question"])):
        return _Question(("",), "", (), row.place, "names no image or has no question; expected an object with "
                         f"`image`, a path, and `question`, a text; its keys are {', '.join(map(str, value))[:200]}")
    number = next((value[name] for name in QUESTION_IDS if isinstance(value.get(name), (int, str))), None)
    return _Question(forms, " ".join(questions), _answers(value, columns),
                     str(forms[0] if image_id is None else image_id), question_id=number)


def _answers(value: dict[str, Any], columns: Columns) -> tuple[str, ...]:
    """Return the answers of a row, repeats counted; of several choices, the correct one."""
    answers = texts_of(columns.get(value, "answer"), ("answer", *TEXT_NAMES))
    choices, correct = value.get("choices"), value.get("correct_choice_idx")
    if not answers and isinstance(choices, list) and isinstance(correct, int) and 0 <= correct < len(choices):
        return texts_of(choices[correct])
    return answers


def _names_of_id(image_id: str, split: str) -> list[str]:
    """Return the names that the image of an id may have: COCO's, then others."""
    padded = f"{int(image_id):012d}" if image_id.isdecimal() else image_id
    return list(dict.fromkeys([f"COCO_{split}_{padded}.jpg", f"{padded}.jpg", f"{image_id}.jpg", f"{image_id}.png"]))


def _split(name: str, content: Any) -> str:
    """Return COCO's name of the split, such as `val2014`."""
    split = content.get("data_subtype") if isinstance(content, dict) else None
    split = split or next(iter(re.findall(r"(?:train|val|test)\d{4}", name)), None)
    word = next(iter(re.findall("train|val|test", name)), "train")
    return str(split or f"{word}{2015 if word == 'test' else 2014}").replace("test-dev", "test")


def _rows_of(spec: str, path: Path, content: dict[str, Any], columns: Columns, notes: list[str]
             ) -> tuple[list[Row], list[str]]:
    """Return the rows of one JSON object, and the text of the file beside it that has the other half of them.

    It may have `questions` or `annotations` (VQAv2), `data` (TextVQA), or one row for every id (GQA); or be one row.
    """
    for name in ("questions", "annotations", "data", "rows"):
        if not isinstance(content.get(name), list):
            continue
        if name in ("data", "rows"):
            return _listed(content[name]), []
        questions = content[name]
        if name == "questions" and not isinstance(content.get("annotations"), list) and any(
                isinstance(row, dict) and columns.get(row, "answer") is not None for row in questions):
            return _listed(questions), []  # of CLEVR: questions with their answers
        return _joined(spec, path, content, notes)
    if columns.get(content, "question") is not None:
        return [Row(":1", content)], []
    if content and all(isinstance(row, dict) for row in content.values()):
        return [Row(f", entry {name!r}", row) for name, row in content.items()], []
    raise DataError(f"source {spec!r}: {path} has {', '.join(map(repr, content))[:200]}; expected `questions`, "
                    "`annotations`, `data`, or a list of questions")


def _expanded(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows with one question: all of an image that lists its `qas` or `qa_pairs` (Visual Genome, Visual7W)."""
    for row in rows:
        inner = next((row.value[name] for name in ("qas", "qa_pairs") if isinstance(row.value.get(name), list)), None
                     ) if row.value else None
        outer = {"image_id": row.value["id"]} | row.value if inner is not None and "id" in row.value else row.value
        yield from [row] if inner is None else (
            Row(f"{row.place}, question {number}", outer | part if isinstance(part, dict) else None, "is no object")
            for number, part in enumerate(inner))


def _listed(values: Sequence[Any]) -> list[Row]:
    return [Row(f", entry {number}", value) if isinstance(value, dict) else
            Row(f", entry {number}", None, f"is {type(value).__name__}; expected an object")
            for number, value in enumerate(values)]


def _joined(spec: str, path: Path, content: dict[str, Any], notes: list[str]) -> tuple[list[Row], list[str]]:
    """Join questions in one file with answers in the other; a test split has questions only."""
    parts, beside, names = {name: content.get(name) for name in ("questions", "annotations")}, "", []
    missing = next((name for name, value in parts.items() if not isinstance(value, list)), None)
    if missing is not None:
        names = _partners(path.name)
        other = next((file for file in map(path.with_name, names) if file.is_file()), None)
        if other is None and missing == "questions":
            raise DataError(f"source {spec!r}: {path} has no questions, and no file of questions is beside it; "
                            "expected " + " or ".join(names or ["v2_OpenEnded_mscoco_SPLIT_questions.json"]))
        if other is not None:
            read = read_json(spec, other)
            beside = read.text
            notes += read.notes
            parts[missing] = read.content.get(missing) if isinstance(read.content, dict) else None
            if not isinstance(parts[missing], list):
                raise DataError(f"source {spec!r}: {other} has no list of `{missing}`")
    asked, answered = _listed(parts["questions"]), [row for row in parts["annotations"] or () if isinstance(row, dict)]
    defined, used = normal_ids([None if row.value is None else row.value.get("question_id") for row in asked],
                               [row.get("question_id") for row in answered])
    if asked and not any(defined) and answered:
        raise DataError(f"source {spec!r}: {path} is not VQAv2's layout (`questions` with `question_id`, `image_id`, "
                        "`question`; beside it `annotations` with `question_id`, `answers`): no 'question_id'")
    answers = {key: row for key, row in zip(used, answered, strict=True) if key is not None}
    matched = answers.keys() & set(defined)
    if answered and not matched:
        raise DataError(f"source {spec!r}: no `question_id` of its {len(answered)} annotations, such as {used[0]!r}, "
                        f"is that of a question, such as {defined[0] if defined else None!r}")
    if len(matched) < len(answered):
        notes.append(f"{len(answered) - len(matched)} of {len(answered)} annotations are of no question in the file")
    rows = [row if row.value is None else Row(row.place, answers.get(key, {}) | row.value)
            for row, key in zip(asked, defined, strict=True)]
    return rows, [beside]


def _partners(name: str) -> list[str]:
    """Return possible names of the annotations file for a questions file, or of the questions file for annotations."""
    if match := re.fullmatch(r"(.*)questions\.json", name):
        rest = match[1]
        return list(dict.fromkeys([f"{rest.replace('OpenEnded_', '').replace('MultipleChoice_', '')}annotations.json",
                                   f"{rest}annotations.json"]))
    if match := re.fullmatch(r"(v2_)?(.*)annotations\.json", name):
        version, rest = match[1] or "", match[2]
        return [f"{version}OpenEnded_{rest}questions.json", f"{version}{rest}questions.json"]
    return []


def _questions(spec: str, path: Path, place: Location, questions: Sequence[_Question], parts: Sequence[str],
               notes: Sequence[str]) -> Questions:
    faults = {number: row.fault for number, row in enumerate(questions) if row.fault is not None}
    if questions and len(faults) == len(questions):
        raise DataError(f"source {spec!r}: {path}{questions[0].image_id} {faults[0]}")
    most = max((len(row.images) for row in questions), default=0)
    forms = [[row.images[min(form, len(row.images) - 1)] for row in questions] for form in range(most)]
    root = find_root(spec, path, forms, root=place.root)
    known: dict[str, str] = {}
    answers = [tuple(known.setdefault(answer, answer) for answer in row.answers) for row in questions]
    texts = [(clean_question(row.text), *(answer for answer, _ in answer_shares(given)))
             for row, given in zip(questions, answers, strict=True)]
    images = [known.setdefault(name, name) for name in (forms[root.form] if forms else ())]
    images = [f"{path.name}{row.image_id}" if row.fault is not None else name
              for row, name in zip(questions, images, strict=True)]
    notes = [*notes, *root.notes, *([f"{len(faults)} of {len(questions)} rows cannot be read"] if faults else ())]
    files = Files(name=spec, root=root.path, files=images, captions=texts, faults=faults, fingerprint="",
                  image_ids=[row.image_id for row in questions])
    chosen = [str(place.columns)] if place.columns.chosen else []
    return Questions(name=spec, rows=files, answer_lists=answers, fingerprint=fingerprint([*parts, *chosen]),
                     most_answers=max((len(text) - 1 for text in texts), default=0), notes=tuple(notes),
                     question_ids=[row.question_id for row in questions])
