"""The end of a server: every accepted request is finished, or told that it is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from llm_accel.common.bundled import load_needle_model
from llm_accel.patches.install import hook_of
from llm_accel.serve.settings import KEY_VARIABLE
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import PATIENCE, start, wait_for


@pytest.mark.parametrize("drain_s", [0.3, 60])
def test_stopping_finishes_or_fails_what_was_accepted(drain_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    running = start(*load_needle_model(), drain_s=drain_s, max_batch=1)
    for host, status in (("localhost:80", 200), ("[::1]", 200), ("rebound.example:80", 401)):  # a server without a key
        assert running.http.get(f"{running.url}/v1/models", headers={"Host": host}).status_code == status
    with ThreadPoolExecutor(3) as pool:
        with running.held(permits=2):
            futures = [pool.submit(running.complete, max_tokens=20) for _ in range(3)]
            wait_for(lambda: running.brake.permits == 0 and len(running.server.engine.scheduler) == 2)
            running.server.should_exit = True
            wait_for(lambda: running.server.engine.status == "shutting down")
            if drain_s > 1:  # there is time: whoever comes now is told, and so is a load balancer
                refused = running.complete()
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
                for path, status in (("live", 200), ("ready", 503), ("health", 503)):
                    probed = httpx.get(f"{running.url}/{path}")
                    assert probed.status_code == status
                    assert probed.json() == {"status": "ok" if status == 200 else "shutting down"}
            if drain_s < 1:  # the model hangs: everything fails, in time
                results = [future.result() for future in futures]
        results = [future.result() for future in futures]
    assert {response.status_code for response in results} == ({503} if drain_s < 1 else {200})
    running.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


@pytest.mark.parametrize("method", ["dense", "snapkv:budget=64"])
def test_a_stopped_server_gives_its_model_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    model = tiny_model()
    running = start(model, tokenizer(), method=method, max_new_tokens=4)
    with running.held(), ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(running.complete)]
        wait_for(running.busy)
        futures += [pool.submit(running.complete, prompt=prompt) for prompt in ("The dog", "The dog watched")]
        wait_for(lambda: len(running.server.engine.scheduler) == 2)
        running.brake.set(None)  # the two run together: the dense model reads them through a method as well
        assert [future.result().status_code for future in futures] == [200] * 3
    assert hook_of(model) is not None
    running.stop()
    assert hook_of(model) is None


def accepted(page: str) -> float:
    """Requests that wait, run or are done."""
    counts = [line.split() for line in page.splitlines() if not line.startswith("#")]
    names = ("llm_accel_queue_depth", "llm_accel_running", "llm_accel_requests_total")
    return sum(float(value) for name, value in counts if name.partition("{")[0] in names)


def test_sigterm_under_load(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "llm_accel", "serve", "--port", "0", "--model", str(tmp_path), "--name", "tiny"]
    options = ["--method", "snapkv:budget=64", "--max-batch", "2", "--drain-s", "100"]
    environment = {key: value for key, value in os.environ.items() if key != KEY_VARIABLE}
    server = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        body = {"model": "tiny", "prompt": "secret words of the dog", "max_tokens": 40}

        def complete(number: int) -> int:
            return http.post(f"{url}/completions", json=body).status_code

        with httpx.Client(timeout=PATIENCE) as http, ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(complete, number) for number in range(6)]
            wait_for(lambda: accepted(http.get(url.removesuffix("v1") + "metrics").text) == 6)
            server.send_signal(signal.SIGTERM)
            assert [future.result() for future in futures] == [200] * 6
        assert server.wait(PATIENCE) == 0
    finally:
        server.kill()
        _, log = server.communicate()
    assert "secret" not in log and log.count("/v1/completions ok") == 6
