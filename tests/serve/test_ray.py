"""The Ray Serve example, as a user starts it, answers the openai client. CI has no ray: it takes minutes to install."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serve.kit import free_port, wait_for
from tests.serve.test_answers import generated, needle_prompts

pytest.importorskip("ray", reason="needs ray, which CI does not install: pip install 'llm_accel[ray]'")
ROOT = Path(__file__).parents[2]
METHOD = "snapkv:budget=128"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    port = free_port()
    arguments = ["--method", METHOD, "--min", "2", "--max", "2", "--port", str(port)]
    example = subprocess.Popen(
        [sys.executable, "examples/ray_serve.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def healthy() -> bool:
        assert example.poll() is None, "the example ended"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(healthy)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        example.send_signal(signal.SIGINT)
        try:
            example.wait(60)
        finally:
            example.kill()


def test_answers_are_those_of_the_model(client: openai.OpenAI, needle: tuple[Any, Any]) -> None:
    prompts = needle_prompts()
    wanted = [generated(needle, ids, METHOD, 12) for ids in prompts]

    def ask(ids: list[int], **more: Any) -> Any:
        return client.completions.create(model="needle", prompt=ids, max_tokens=12, **more)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts * 4))
    assert [answer.choices[0].text for answer in answers] == wanted * 4
    assert "".join(part.choices[0].text for part in ask(prompts[0], stream=True) if part.choices) == wanted[0]
    assert ask(prompts[0], extra_body={"llm_accel": {"method": "dense"}}).llm_accel == {"method": "dense"}


def test_errors_are_those_of_the_server(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["needle"]
    with pytest.raises(openai.BadRequestError, match="snapkv"):
        client.completions.create(model="needle", prompt="a", extra_body={"llm_accel": {"method": "snapkw"}})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a")
