"""A folder of images with a file of questions, JSON lines or CSV, through ``llm-accel vision``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.question_file import QuestionFile
from llm_accel.eval.tasks.vision.scoring import score
from tests.eval.vision_helpers import records, save_tiny, vision

ROWS = [
    {"image": "a.png", "question": "how many legs?", "answer": [4, "four"], "task": "count"},
    {"image": "sub/b.png", "question": "what is it?", "answer": "A dog", "_note": "mine"},
    {"image": "a.png", "question": "is there a cat?", "answer": "Yes", "task": "existence", "split": "popular"},
    {"image": "a.png", "question": "how many tails?", "answer": "1|one", "task": "count"},
    {"image": "a.png", "task": "caption", "objects": ["cat", "sofa"]},
]
CSV = """image,question,answer,task,split,objects,_note
a.png,how many legs?,4|four,count,,,
sub/b.png,what is it?,A dog,,,,mine
a.png,is there a cat?,Yes,existence,popular,,
a.png,"how many tails?",1|one,count,,,
a.png,,,caption,,cat|sofa,
"""


def write(folder: Path, content: str, name: str = "questions.jsonl") -> Path:
    (folder / "sub").mkdir(parents=True)
    for image in ("a.png", "sub/b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(folder / image)
    (folder / name).write_text(content, encoding="utf-8")
    return folder


def lines(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_a_folder_with_questions_from_end_to_end(model, tmp_path, capsys):
    data = write(tmp_path / "data", lines(ROWS))
    argv = ["--data", f"questions:{data}", "--method", "dense", "--method", "flowcut:budget=20"]
    assert vision(model, tmp_path / "run", *argv) == 0
    tables, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    summary = json.loads(last)
    assert (summary["samples"], summary["records"], summary["complete"]) == (2, 15, True)
    tasks = summary["methods"]["flowcut:budget=20"]["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {
        "count": 2,
        "existence": 1,
        "caption": 1,
        "question": 1,
    }
    assert list(summary["methods"]["dense"]["pope"]) == ["popular"] and summary["methods"]["dense"]["chair"]["n"] == 1
    assert "question" in tables and "count" in tables
    keys = [(r["sample"], r["task"], r["number"]) for r in records(tmp_path / "run") if r["method"] == "dense"]
    assert keys == [(0, "count", 0), (0, "existence", 0), (0, "count", 1), (0, "caption", 0), (1, "question", 0)]
    more = ["--data", f"questions:{data / 'questions.jsonl'}", "--tasks", "count", "--no-blind", "--json-only"]
    assert vision(model, tmp_path / "counts", *more, "--method", "dense") == 0
    assert json.loads(capsys.readouterr().out)["records"] == 2


def test_csv_says_the_same_as_json_lines(tmp_path):
    one = QuestionFile.load(str(write(tmp_path / "json", lines(ROWS))), None, None)
    two = QuestionFile.load(str(write(tmp_path / "csv", "\ufeff" + CSV, "questions.csv")), None, None)
    assert one.groups == two.groups and one.digest() == two.digest() and one.digest()[0] == 5
    assert len(QuestionFile.load(str(tmp_path / "csv"), 1, None)) == 1


def test_any_of_the_answers_is_right(tmp_path):
    data = QuestionFile.load(str(write(tmp_path / "data", lines(ROWS))), None, None)
    legs, cat, _, caption = data.examples(0)
    said = [score(e.task, text, (e.answer, *e.others), e.objects, data.mentions)["exact"] for e, text in (
        (legs, "Four."), (legs, "4"), (legs, "five"), (cat, "yes, there is"),
        (caption, "A cat on two sofas"), (caption, "a cat"),
    )]  # fmt: skip
    assert said == [1, 1, 0, 1, 1, 0]
    assert caption.question == "Please describe this image in detail." and data.max_new_tokens == 64


@pytest.mark.parametrize(("row", "words"), [
    ({"question": "?", "answer": "x"}, "row 1 has no image; a row needs image, question and answer"),
    ({"image": "a.png", "answer": "x"}, "row 1 has no question"),
    ({"image": "a.png", "question": "?"}, "row 1 has no answer; give one, or the task caption"),
    ({"image": "a.png", "question": "?", "anwser": "x"}, "Did you mean 'answer'.*Begin the name of a column"),
    ({"image": "a.png", "question": "?", "answer": "maybe", "task": "existence"}, "the answer 'maybe'; give yes or no"),
    ({"image": "a.png", "question": "?", "answer": "x", "task": "Big Things"}, "task 'Big Things'; give lower-case"),
    ({"image": "a.png", "task": "caption"}, "a caption, has no objects"),
    ({"image": "a.png", "question": "?", "answer": {"a": 1}}, "answer is {'a': 1}; give a text, or a list"),
    ({"image": "a.png", "question": "?", "answer": True}, "answer is True; give a text"),
    ({"image": ["a.png", "b.png"], "question": "?", "answer": "x"}, "image is .*; give one text"),
    ({"image": "c.png", "question": "?", "answer": "x"}, "1 of 1 images are not there, first .*c.png"),
    ([1], "row 1 is \\[1\\]; give an object with image, question"),
])  # fmt: skip
def test_a_row_that_cannot_be_asked_is_refused(model, tmp_path, capsys, row, words):
    data = write(tmp_path / "data", json.dumps(row) if isinstance(row, dict) else "[[1]]")
    assert vision(model, tmp_path / "run", "--data", f"questions:{data}") == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_a_file_that_is_none_is_refused(tmp_path):
    folder = write(tmp_path / "data", lines(ROWS))
    (folder / "questions.csv").write_text(CSV + "a.png,one,cell,too,many,for,the,header\n")
    for place, words in (
        (folder, "needs one of .* and has questions.jsonl and questions.csv"),
        (folder / "sub", "has none"),
        (folder / "none.jsonl", "no such file; give a folder with one of"),
        (folder / "a.png", "cannot be read as JSON lines"),
        (folder / "questions.csv", "row 6.*unknown column '.no name.'"),
    ):
        with pytest.raises(ConfigError, match=words):
            QuestionFile.load(str(place), None, None)
    (folder / "empty.csv").write_text("image,question,answer\n")
    with pytest.raises(ConfigError, match="has no rows"):
        QuestionFile.load(str(folder / "empty.csv"), None, None)
    with pytest.raises(ConfigError, match="Did you mean 'count'"):
        QuestionFile.load(str(folder / "questions.jsonl"), None, ["counts"])
