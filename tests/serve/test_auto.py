"""A server whose method is ``auto``: batches and conversations are those of the method that it chooses."""

from __future__ import annotations

from typing import Any

from llm_accel.common.bundled import load_needle_model
from tests.serve.kit import start
from tests.serve.test_answers import generated, needle_prompts


def test_answers_are_those_of_the_chosen_method(needle: tuple[Any, Any]) -> None:
    ids = needle_prompts()[0]
    running = start(*load_needle_model(), method="auto:budget=128", allow_methods="auto,snapkv")
    try:
        answer = running.complete(ids, max_tokens=6).json()["choices"][0]["text"]
        assert answer == generated(needle, ids, "snapkv:budget=128", 6)
        smaller = running.complete(ids, max_tokens=6, llm_accel={"method": "auto:budget=64"}).json()
        assert smaller["choices"][0]["text"] == generated(needle, ids, "snapkv:budget=64", 6)
        refused = running.complete(ids, llm_accel={"method": "auto:memory=0.00001"})
        assert refused.status_code == 400 and "room for 128 entries" in refused.text
    finally:
        running.stop()
