"""A server whose decode steps are compiled: prompts read ahead of a batch go into the graph's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llm_accel.common.bundled import load_needle_model
from llm_accel.errors import ConfigError
from llm_accel.methods import SnapKV
from llm_accel.patches.compiled import call
from llm_accel.serve.settings import ServeSettings
from tests.serve.kit import Running, start
from tests.serve.test_answers import generated, needle_prompts


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(call, "backend", lambda: "eager")  # captured, and run as it is
    running = start(
        *load_needle_model(),
        method="snapkv:budget=128",
        decode="compiled",
        allow_methods="vasparse",
        max_batch=2,
    )
    yield running
    running.stop()


def test_answers_are_those_of_plain_generate(compiling: Running, needle: tuple[Any, Any]) -> None:
    prompts = needle_prompts()[:2]
    expected = [generated(needle, ids, "snapkv:budget=128", 6) for ids in prompts]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda ids: compiling.complete(ids, max_tokens=6).json(), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    compiling.idle()  # answers leave before the inference thread is done with the cache
    hook = compiling.server.engine._methods._hooks[(SnapKV(budget=128),)]
    assert hook.plan.backends["decode steps"][0] == "compiled"
    assert call.refusal_of(compiling.server.engine._forward.model.get_decoder()) is None
    refused = compiling.complete(llm_accel={"method": "vasparse"}, max_tokens=2)
    assert refused.status_code == 400


def test_decode_is_checked() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'compiled'"):
        ServeSettings(decode="compile")
