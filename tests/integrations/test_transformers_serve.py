"""``transformers serve`` with a method on every model that it loads."""

from __future__ import annotations

import socket

import openai
import pytest
from transformers.cli.serving.model_manager import ModelManager

from llm_accel import cli
from llm_accel.common.bundled import load_needle_model, needle_model_path
from llm_accel.integrations.transformers_serve import server
from llm_accel.registry import parse_all
from tests.serve.kit import PATIENCE, wait_for
from tests.serve.test_answers import generated, needle_prompts


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_answers_are_those_of_the_method() -> None:
    needle = load_needle_model()
    path, port, load = str(needle_model_path()), free_port(), ModelManager._load_model
    serve = server(parse_all("streaming_llm:budget=64"))
    running = serve(path, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        wait_for(lambda: running.server.started)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE)
        prompt = needle[1].decode(needle_prompts()[0])
        ids = needle[1](prompt)["input_ids"]
        answer = client.completions.create(model=path, prompt=prompt, max_tokens=8, temperature=0)
    finally:
        running.kill_server()
    expected = generated(needle, ids, "streaming_llm:budget=64", 8)
    assert answer.choices[0].text == expected != generated(needle, ids, None, 8)
    assert ModelManager._load_model is load


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "snapvk"], "Did you mean 'snapkv'?"),
        (["--method", "snapkv", "model", "--continuous-batching"], "--continuous-batching"),
        (["--method", "snapkv", "--", "model", "--compile"], "static cache"),
    ],
)
def test_what_would_undo_the_method_is_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["transformers-serve", *arguments]) == cli.USAGE_ERROR
    assert says in capsys.readouterr().err
