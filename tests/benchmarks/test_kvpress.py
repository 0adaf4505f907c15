"""The comparison with kvpress: both sides read the same ids, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.peers.kvpress import __main__ as command
from benchmarks.peers.kvpress.rows import Row, rows
from benchmarks.peers.kvpress.theirs import answer, main
from llm_accel.eval.engine import TextEngine
from llm_accel.eval.grid import GridPoint
from llm_accel.registry import parse
from tests.eval.needle_helpers import make_maker, tiny_model, tokenizer


def prompt_of(length: int = 300) -> Any:
    return make_maker(chat_template=True, max_new_tokens=6).make(GridPoint(length, 50.0, 0))


def test_rows_are_methods_of_ours() -> None:
    for agnostic in (False, True):
        made = rows(agnostic)
        assert made[0].name == "dense" and len({row.name for row in made}) == len(made)
        for row in made[1:]:
            config = parse(row.name)
            assert config is not None and config.name == row.method and config.ratio == row.share


@pytest.mark.filterwarnings("ignore:.*past_key_values.*")
@pytest.mark.parametrize("agnostic", [False, True])
def test_their_dense_answer_is_ours(agnostic: bool) -> None:
    engine, prompt = TextEngine(tiny_model(), tokenizer(), agnostic), prompt_of()
    engine.ends, engine._options["eos_token_id"] = set(), None
    expected = engine.run([prompt], ())
    given = {"ids": prompt.ids, "context_length": prompt.context_length, "new_tokens": prompt.new_tokens}
    found = answer(tiny_model(), given, Row("dense", 1.0, agnostic), ())
    assert found["tokens"] == expected.answers[0]
    assert found["kv_bytes"] == 300 * expected.dense_kv_bytes // 305 and found["seconds"] > 0


@pytest.mark.filterwarnings("ignore:.*past_key_values.*")
def test_their_side_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    p = prompt_of()
    described = {"name": "single 300 50 0", "ids": p.ids, "context_length": p.context_length, "new_tokens": 2}
    job = {"model": str(tmp_path / "model"), "dtype": "float32", "ends": [], "prompts": [described]}
    for agnostic in (False, False, True):
        job["rows"] = [Row("dense", 1.0, agnostic).__dict__]
        (tmp_path / "job.json").write_text(json.dumps(job))
        main(tmp_path / "job.json", tmp_path / "records.jsonl")
    records = command.read(tmp_path / "records.jsonl")
    assert [record["agnostic"] for record in records] == [False, True]


def test_the_table_counts_answers_and_bytes_by_way_task_and_length() -> None:
    prompts = {f"single 100 {at} 0": SimpleNamespace(expected=("1234567",), ids=range(100)) for at in (0, 50)}

    def records(row: str, answers: tuple[str, ...], held: int) -> list[dict[str, Any]]:
        return [
            {"prompt": name, "agnostic": False, "row": row, "tokens": text, "kv_bytes": held, "seconds": 1.0}
            for name, text in zip(prompts, answers, strict=True)
        ]

    right, wrong = "1234567.", "12345."
    sides = {
        "llm_accel": records("dense", (right, right), 100) + records("snapkv:ratio=0.25", (right, right), 25),
        "kvpress": records("dense", (right, right), 100) + records("snapkv:ratio=0.25", (right, wrong), 25),
    }
    dense, snapkv = command.summarize(sides, prompts, str, 1.0)  # type: ignore[arg-type]
    assert (dense["way"], dense["task"], dense["length"], dense["row"]) == ("query-aware", "single", 100, "dense")
    assert [(snapkv[side]["found"], snapkv[side]["of"], snapkv[side]["held"]) for side in sides] == [
        (2, 2, 0.25),
        (1, 2, 0.25),
    ]
    assert command.cell([], prompts, str, 1.0) is None  # type: ignore[arg-type]
    assert command.token_bytes(tiny_model()) == 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, head dim, fp32
