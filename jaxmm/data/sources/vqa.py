"""Read questions about images with their answers, in the layouts of VQAv2, easy-VQA and BLIP."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.data.base import DataError, Record, Source, fingerprint, image_folder, read_text
from jaxmm.data.sources.files import Files
from jaxmm.data.tokenizers import Tokenizer

REMOVED = str.maketrans("", "", '.!"()*#:;~')
"""Characters that BLIP removes from questions."""
WORDS = 50
"""The largest number of words of a question."""
Row = tuple[str, str, tuple[str, ...], str]
"""An image file, a question, its answers, and the id of the image."""


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
    fingerprint: str = field(repr=False)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        """Read the bytes of the image."""
        record = self.rows[index]
        question = record.pop("texts")[0]
        return record | {"question": question, "answers": self.answers(index)}

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
    """Open easy-VQA's folder, VQAv2's two files, or JSON (also lines) with `image`, `question` and `answer`."""
    path = Path(location)
    if path.is_dir():
        file = path / "questions.json"
        if not file.is_file():
            raise DataError(f"source {spec!r}: no questions.json in the folder {location!r}")
        return _open_folder(spec, file)
    text = read_text(spec, location)
    content = _parse(spec, location, text)
    if isinstance(content, dict):
        return _open_vqav2(spec, path, content, text)
    rows = [_row(row, f"source {spec!r}: {location}, record {number}") for number, row in enumerate(content, 1)]
    root = path.parent
    if rows and not (root / rows[0][0]).is_file():
        root = image_folder(path, rows[0][0]) or root
    return _questions(spec, root, rows, [text])


def _open_folder(spec: str, file: Path) -> Questions:
    text = read_text(spec, str(file))
    rows: list[Row] = []
    for number, row in enumerate(_parse(spec, str(file), text), 1):
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or isinstance(row[2], list):
            raise DataError(f"source {spec!r}: {file}, record {number} is {row!r}; expected [question, answer, image "
                            "number]")
        rows.append((f"images/{row[2]}.png", row[0], (str(row[1]),), str(row[2])))
    return _questions(spec, file.parent, rows, [text])


def _open_vqav2(spec: str, path: Path, content: dict[str, Any], text: str) -> Questions:
    """Open questions in one file and answers in the other; a test split has questions only."""
    name = "annotations" if "questions" in content else "questions"
    other = next((file for file in map(path.with_name, _partners(path.name)) if file.is_file()), None)
    if other is None and name == "questions":
        raise DataError(f"source {spec!r}: {path} has no questions, and no file of questions is beside it; expected "
                        + " or ".join(_partners(path.name) or ["v2_OpenEnded_mscoco_SPLIT_questions.json"]))
    beside = "" if other is None else read_text(spec, str(other))
    contents = [content, {} if other is None else _parse(spec, str(other), beside)]
    questions, annotations = contents if name == "annotations" else reversed(contents)
    try:
        answers: dict[Any, tuple[str, ...]] = {
            row["question_id"]: tuple(str(answer["answer"]) for answer in row["answers"])
            for row in annotations.get("annotations", ())}
        split = questions.get("data_subtype") or next(
            iter(re.findall(r"(?:train|val|test)\d{4}", path.name)), "train2014")
        split = split.replace("test-dev", "test")
        entries = [(row["image_id"], row["question"], answers.get(row["question_id"], ()))
                 for row in questions["questions"]]
        names = [[f"COCO_{split}_{number:012d}.jpg", f"{number:012d}.jpg"] for number, _, _ in entries]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"source {spec!r}: {path} is not VQAv2's layout (`questions` with `question_id`, `image_id`, "
                        f"`question`; beside it `annotations` with `question_id`, `answers`): "
                        f"{type(error).__name__} {error}") from None
    root, form = path.parent, 0
    if names:
        places = ((image_folder(path, name), form) for form, name in enumerate(names[0]))
        root, form = next(((folder, form) for folder, form in places if folder is not None), (None, 0))
        if root is None:
            raise DataError(f"source {spec!r}: {names[0][0]!r}, the first image, is neither beside {path} nor in a "
                            f"folder beside it or beside its folder")
    rows = [(name[form], question, given, str(number))
            for name, (number, question, given) in zip(names, entries, strict=True)]
    return _questions(spec, root, rows, [text, beside])


def _partners(name: str) -> list[str]:
    """Return possible names of the annotations file for a questions file, or of the questions file for annotations."""
    if match := re.fullmatch(r"(.*)questions\.json", name):
        rest = match[1]
        return list(dict.fromkeys([f"{rest.replace('OpenEnded_', '')}annotations.json", f"{rest}annotations.json"]))
    if match := re.fullmatch(r"(v2_)?(.*)annotations\.json", name):
        version, rest = match[1] or "", match[2]
        return [f"{version}OpenEnded_{rest}questions.json", f"{version}{rest}questions.json"]
    return []


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not isinstance(row.get("question"), str):
        raise DataError(f"{where}: expected an object with `image`, a path, and `question`, a text")
    given = next((row[name] for name in ("answers", "answer") if row.get(name) is not None), ())
    given = given if isinstance(given, list) else (given,) if given != () else ()
    if not all(isinstance(answer, (str, int, float)) for answer in given):
        raise DataError(f"{where}: expected `answer`, a text, or `answers`, a list of texts")
    return row["image"], row["question"], tuple(map(str, given)), str(row.get("image_id", row["image"]))


def _parse(spec: str, location: str, text: str) -> Any:
    """Read one JSON value, or a list of one per line. Raises `DataError` unless it is a list or an object."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as first:
        content = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                content.append(json.loads(line))
            except json.JSONDecodeError as error:
                lines = number > 1 and content
                raise DataError(f"source {spec!r}: {location}:{number if lines else first.lineno} is not JSON: "
                                f"{error if lines else first}") from None
    if isinstance(content, dict) and "question" in content:  # JSON lines of one line
        content = [content]
    if not isinstance(content, (list, dict)):
        raise DataError(f"source {spec!r}: {location} is {type(content).__name__}; expected questions")
    return content


def _questions(spec: str, root: Path, rows: Sequence[Row], parts: Iterable[str]) -> Questions:
    known: dict[str, str] = {}
    answers = [tuple(known.setdefault(answer, answer) for answer in given) for _, _, given, _ in rows]
    texts = [(clean_question(question), *(answer for answer, _ in answer_shares(given)))
             for (_, question, _, _), given in zip(rows, answers, strict=True)]
    images = [known.setdefault(file, file) for file, _, _, _ in rows]
    files = Files(name=spec, root=str(root), files=images, captions=texts, image_ids=[row[3] for row in rows],
                  fingerprint="")
    return Questions(name=spec, rows=files, answer_lists=answers, fingerprint=fingerprint(parts),
                     most_answers=max((len(text) - 1 for text in texts), default=0))
