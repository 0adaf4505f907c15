"""Haystacks from files, folders and datasets, and what is refused."""

from __future__ import annotations

import json
import random
import sys
from itertools import islice

import pytest

from llm_accel import ConfigError
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.haystack import load_haystack
from tests.eval.needle_helpers import make_maker, tokenizer

TEXT = 'The river was old.  A dog\nwatched it! Was it "red"? No.\n\nThe end came quickly.'
SENTENCES = ["The river was old.", "A dog watched it!", 'Was it "red"?', "No.", "The end came quickly."]


def _texts(source: str, tokens: int = 10**6) -> list[str]:
    encoder = Encoder(tokenizer())
    return [encoder.decode(ids).strip() for ids in load_haystack(source, encoder, tokens).sentences]


def test_a_file_is_split_into_sentences(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert _texts(str(tmp_path / "a.txt")) == SENTENCES


def test_a_folder_is_read_in_order_and_only_as_far_as_needed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.md", "Two is here."), ("a.txt", "One is here."), ("sub/c.TXT", "Three."), ("d.bin", "No.")):
        (tmp_path / name).write_text(text)
    assert _texts(str(tmp_path)) == ["One is here.", "Two is here.", "Three."]
    (tmp_path / "a.txt").write_text("One is here. " * 3000)
    assert len(_texts(str(tmp_path), tokens=100)) < 3000


def test_text_without_full_stops_is_cut_at_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("river " * 1000 + "x" * 2500)
    pieces = _texts(str(tmp_path / "a.txt"))
    assert all(0 < len(piece) <= 1000 for piece in pieces)
    assert "".join(pieces).replace(" ", "") == "river" * 1000 + "x" * 2500


def test_a_prompt_of_a_short_file_repeats_it(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    maker = make_maker(haystack=str(tmp_path / "a.txt"))
    drawn = [maker.encoder.decode(ids).strip() for ids in islice(maker.haystack.draw(random.Random(1)), 12)]
    start = SENTENCES.index(drawn[0])
    assert drawn == [SENTENCES[(start + i) % 5] for i in range(12)]
    assert len(maker.make(GridPoint(2048, 50, 0)).ids) == 2048
    assert maker.haystack.tokens < 200


def test_a_dataset_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("One is here.", "Two.")))
    assert _texts(f"dataset:{data},column=body") == ["One is here.", "Two."]
    with pytest.raises(ConfigError, match="no column 'text'; columns are body"):
        _texts(f"dataset:{data}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        _texts(f"dataset:{data},split=nowhere")


def test_datasets_missing_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"llm_accel\[eval\]"):
        _texts("dataset:anything")


@pytest.mark.parametrize(("source", "message"), [
    ("no/such/place", "no such file or folder"),
    ("dataset:", "names no dataset"),
    ("dataset:x,colum=text", "'colum=text' is not one of"),
])  # fmt: skip
def test_sources_that_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        _texts(source)


def test_unreadable_files_are_refused(tmp_path):
    empty, binary, folder = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "folder"
    empty.write_text("  \n ")
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    folder.mkdir()
    for path, message in ((empty, "holds no text"), (binary, "not UTF-8"), (folder, "holds no .txt or .md")):
        with pytest.raises(ConfigError, match=message):
            _texts(str(path))
