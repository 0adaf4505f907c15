"""The way of a user: `llm-accel vllm`, an OpenAI client with an image. Skipped where vLLM is not installed."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig

from llm_accel.common.bundled import vision_model_path
from llm_accel.eval.tasks.vision.examples import SceneSource
from llm_accel.integrations.vllm.blocks import policy_of
from tests.integrations.vllm import kit

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
ROOT = Path(__file__).parents[3]
OPTIONS = "--served-model-name vision --dtype float32 --max-model-len 512 --enforce-eager --max-num-seqs 4"
STARTED_WITHIN = 600  # seconds, on a machine that others use as well


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "llm_accel",
        "vllm",
        str(vision_model_path()),
        "--method",
        "flowcut+snapkv:budget=192",
    ]
    quiet = kit.QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "PYTHONPATH": str(ROOT)}
    log, url = tmp_path_factory.mktemp("server") / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *OPTIONS.split(), "--block-size", "32", "--port", str(port)],
            cwd=ROOT, env=os.environ | quiet, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        until = time.monotonic() + STARTED_WITHIN
        while not _answers(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield url, log
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_an_openai_client_asks_about_an_image(server):
    from openai import OpenAI
    from PIL import Image

    url, log = server
    example = SceneSource(1, 0).examples(0)[0]
    picture = io.BytesIO()
    Image.fromarray(example.image).save(picture, "PNG")
    image = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"},
    }
    content = [image, {"type": "text", "text": example.question}]
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="vision", messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
    )
    assert answer.choices[0].message.content.strip() == example.answer
    assert 34 < answer.usage.prompt_tokens < 50  # 34 of 100 visual tokens, and the question
    assert "llm_accel: flowcut:llm_stage=off+snapkv:budget=192 on CPU_ATTN" in log.read_text()


def metric(url: str, name: str) -> tuple[float, str] | None:
    """The value of a metric and its labels; None where there is none of the name."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
    return (float(lines[0].rpartition(" ")[2]), lines[0].rpartition(" ")[0]) if lines else None


def test_metrics_show_freed_blocks(server):
    """Prompts of 14 blocks and a budget of 6; the figures cross from the process that schedules to the server's."""
    url, _ = server
    before = metric(url, "llm_accel:kv_blocks_freed")
    policy = policy_of("snapkv:budget=192", 32)
    for prompt in kit.prompts([448, 440]):
        body = {"model": "vision", "prompt": [token % 50 + 5 for token in prompt], "max_tokens": 8, "temperature": 0}
        data, kind = json.dumps(body | {"ignore_eos": True}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", data, kind)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
    wanted = sum(last - first for first, last in (policy.gap(length, length) for length in (448, 440)))
    blocks, labels = metric(url, "llm_accel:kv_blocks_freed")
    assert blocks - (before[0] if before else 0) == wanted > 10
    assert 'engine="0"' in labels and 'method="snapkv:budget=192"' in labels and 'model_name="vision"' in labels
    text = AutoConfig.from_pretrained(vision_model_path()).get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    page = 32 * text.num_key_value_heads * 2 * head * 4  # keys and values in fp32
    assert metric(url, "llm_accel:kv_bytes_freed")[0] == blocks * page * text.num_hidden_layers
    assert metric(url, "llm_accel:requests_running")[0] == 0
    assert metric(url, "vllm:kv_cache_usage_perc")[0] == 0
