"""Scenes of a third party's generator: through methods, controls and tables like our own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.generated import GeneratedSource
from llm_accel.eval.tasks.vision.generators import GeneratedScene, Question, covered, load_generator
from llm_accel.eval.tasks.vision.scoring import naming
from tests.eval.vision_helpers import records, save_tiny, vision

CODE = """
import numpy as np
from llm_accel.eval.tasks.vision.generators import GeneratedScene, Question, covered

COLOURS = {"red": (230, 31, 31), "green": (26, 179, 38), "blue": (38, 64, 242)}

def draw(rng):
    name = str(rng.choice(list(COLOURS)))
    image, mask = np.full((96, 160, 3), 110, np.uint8), np.zeros((96, 160), bool)
    y, x = rng.integers(0, 60, 2)
    mask[y : y + 30, x : x + 30] = True
    image[mask] = COLOURS[name]
    questions = [
        Question("existence", f"is there a {name} square?", "yes", "random"),
        Question("colour", "what colour is the square?", name),
        Question("existence", "is there a white star?", "no", "random"),
        Question("caption", "describe the image."),
    ]
    names = [f"{colour} square" for colour in COLOURS] + ["white star"]
    return GeneratedScene(image, questions, frozenset({f"{name} square"}), names, covered(mask, 10, 10))

class Grouped:
    def draw(rng):
        return draw(rng)

def restless(rng):
    return draw(np.random.default_rng())

def plain(rng):
    return {"image": 1}

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    place = tmp_path / "own_scenes.py"
    place.write_text(CODE)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_a_run_on_a_file_has_methods_controls_tables_and_pictures(model, file, tmp_path, capsys):
    argv = ["--method", "dense", "--method", "blank", "--method", "flowcut", "--method", "oracle", "--keep", "0.33"]
    data = f"scenes:{file}:draw"
    assert vision(model, tmp_path / "run", "--data", data, *argv) == 0
    tables, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    rows = json.loads(last)["methods"]
    assert list(rows) == ["dense", "blank", "flowcut:ratio=0.33", "oracle:ratio=0.33", "blind"]
    assert {name: part["n"] for name, part in rows["dense"]["tasks"].items()} == {
        "existence": 4,
        "colour": 2,
        "caption": 2,
    }
    assert list(rows["dense"]["pope"]) == ["random"] and rows["dense"]["chair"]["n"] == 2
    assert rows["oracle:ratio=0.33"]["patch_recall"] == 1 > rows["flowcut:ratio=0.33"]["patch_recall"]
    assert data in tables and (tmp_path / "run" / "kept-oracle-ratio-0.33.png").is_file()
    numbers = {(r["sample"], r["task"], r["number"]) for r in records(tmp_path / "run")}
    assert numbers == {
        (i, *key) for i in (0, 1) for key in [("existence", 0), ("existence", 1), ("colour", 0), ("caption", 0)]
    }
    assert vision(model, tmp_path / "one", "--data", data, "--tasks", "colour", "--method", "dense", "--no-blind") == 0
    same = ("sample", "task", "number", "question", "expected", "answer")
    found, again = (
        [[r[key] for key in same] for r in records(tmp_path / run) if r["task"] == "colour" and r["method"] == "dense"]
        for run in ("run", "one")
    )
    assert found == again


def test_a_file_may_define_dataclasses_and_be_called_like_a_package(tmp_path):
    place = tmp_path / "torch.py"
    place.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Mark:\n    side: float = 1.0\n"
        "def draw(rng):\n    return Mark()\n"
    )
    generator = load_generator(f"{place}:draw")
    assert generator(None).side == 1.0
    assert sys.modules["torch"] is torch


def test_a_scene_depends_on_seed_and_number_alone(file):
    few, many, other = (GeneratedSource.load(f"{file}:draw", n, seed, None) for n, seed in ((1, 0), (3, 0), (1, 1)))
    assert (few.examples(0)[0].image == many.examples(0)[0].image).all()
    assert not (few.examples(0)[0].image == other.examples(0)[0].image).all()
    assert len({one.examples(0)[0].image.tobytes() for one in (few, other)}) == 2
    assert few.digest()[0] == 4 and many.digest() == GeneratedSource.load(f"{file}:Grouped.draw", 3, 0, None).digest()
    assert few.max_new_tokens == 64 and GeneratedSource.load(f"{file}:draw", 2, 0, ["colour"]).max_new_tokens == 10


def test_an_installed_package_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "some_scenes.py").write_text(CODE)
    info = tmp_path / "some_scenes-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_scenes\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[llm_accel.scenes]\nsquares = some_scenes:draw\nbroken = some_scenes:nothing\nnumber = some_scenes:number\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_generator("squares")(np.random.default_rng(0)).names
    assert load_generator("some_scenes:draw") is load_generator("squares")
    for name, words in (
        ("sqaures", "Did you mean 'squares'.*scenes:FILE.py:FUNCTION"),
        ("broken", r"'scenes:broken' \(some_scenes:nothing\) cannot be imported"),
        ("number", "is 3; give a function"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_generator(name)


@pytest.mark.parametrize(("place", "more", "words"), [
    ("{}:nothing", [], "cannot be imported: AttributeError"),
    ("{}:number", [], "give a function that draws a scene"),
    ("{}:plain", [], "scene 0 is a dict; the function must return a GeneratedScene"),
    ("{}:restless", [], "draws another scene from the same random numbers"),
    ("no/such/file.py:draw", [], "no such file"),
    ("no_such_module:draw", [], "ModuleNotFoundError"),
    ("{}:draw", ["--tasks", "color"], "Did you mean 'colour'"),
    ("{}:draw", ["--tasks", ","], "--tasks is empty"),
    ("{}:draw", ["--split", "dense"], "--split belongs to generated scenes"),
    ("", [], "scenes:GENERATOR"),
])  # fmt: skip
def test_what_is_no_generator_ends_before_anything_is_written(model, file, tmp_path, capsys, place, more, words):
    assert vision(model, tmp_path / "run", "--data", "scenes:" + place.format(file), *more) == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "run").exists()


IMAGE = np.zeros((8, 8, 3), np.uint8)
ASKED = (Question("colour", "?", "red"),)


@pytest.mark.parametrize(("options", "words"), [
    ({"image": IMAGE.astype(float)}, r"image is float64 \[8, 8, 3\]; give uint8"),
    ({"image": IMAGE[..., 0]}, r"uint8 \[8, 8\]; give"),
    ({"questions": ()}, "no questions"),
    ({"questions": (Question("existence", "is it?", "maybe"),)}, "'is it\\?', an existence question.*give yes or no"),
    ({"questions": (Question("colour", "which?", " "),)}, "'which\\?' has no answer"),
    ({"questions": (Question("Colour", "?", "red"),)}, "the task 'Colour'; give lower-case"),
    ({"questions": (Question("caption", "?"),), "objects": frozenset({"cat"}), "names": ["dog"]}, r"objects \(cat\)"),
    ({"questions": (Question("caption", "?"),)}, "needs names"),
    ({"patches": np.ones((2, 2))}, r"float64 \[2, 2\]; give bool"),
])  # fmt: skip
def test_a_scene_that_cannot_be_asked_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        GeneratedScene(**{"image": IMAGE, "questions": ASKED} | options)


@pytest.mark.parametrize("shape", [(40, 40), (37, 53)])
def test_covered_patches_by_counting_pixels(shape):
    mask = np.random.default_rng(0).random(shape) < 0.13
    rows, columns = 4, 5
    for row in range(rows):
        for column in range(columns):
            part = mask[
                row * shape[0] // rows : (row + 1) * shape[0] // rows,
                column * shape[1] // columns : (column + 1) * shape[1] // columns,
            ]
            assert covered(mask, rows, columns)[row, column] == (part.mean() > 0.12)


def test_names_in_a_caption():
    found = naming(["red Square", "square", "star"])
    assert found("Two red squares and a STAR; restart. a  red square") == ["red Square", "star", "red Square"]
    assert found("A square.") == ["square"] and naming([])("a star") == []
