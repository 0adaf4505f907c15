"""What one request can do to a running server: nothing. It is refused at once, others do not notice, memory stays."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_accel.serve.settings import KEY_VARIABLE

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from /proc")

SECONDS, HEALTH_SECONDS, MIB = 1.0, 0.1, 200
ATTEMPTS = 4  # the machine may be busy with something else; what a request does to the server it does every time

# a process of its own: this one holds its interpreter's lock while it makes and sends bodies
POLL = """
import http.client, select, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
worst, answers = 0.0, 0
while not (answers > 2 and select.select([sys.stdin], [], [], 0.005)[0]):
    begin = time.perf_counter()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    worst, answers = max(worst, time.perf_counter() - begin), answers + 1
    if answers == 1:
        worst = 0.0  # the connection was made
        print("polling", flush=True)
print(worst, flush=True)
"""


@dataclass
class Victim:
    """A server in a process of its own, and the memory that it needs when nothing happens."""

    port: int
    process: subprocess.Popen[str]
    idle_kib: int = 0

    def kib(self, field: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    @contextmanager
    def polled(self) -> Iterator[list[float]]:
        """Asks for ``/health`` all the time; the list holds the longest wait afterwards, in seconds."""
        worst: list[float] = []
        command = [sys.executable, "-S", "-c", POLL, str(self.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as poll:
            assert poll.stdout is not None and poll.stdout.readline() == "polling\n"
            yield worst
            out, _ = poll.communicate()
            worst.append(float(out))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    environment = {key: value for key, value in os.environ.items() if key != KEY_VARIABLE}
    command = [sys.executable, "-m", "llm_accel", "serve", "--port", "0", "--method", "snapkv:budget=128"]
    log = tmp_path_factory.mktemp("victim") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *ALLOW], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        running = Victim(int(json.loads(line)["url"].rpartition(":")[2].removesuffix("/v1")), process)
        for kind in ("chat/completions", "completions"):
            assert running.post(f"/v1/{kind}", b"{}")[0] == 400
        assert running.post("/v1/completions", GOOD)[0] == 200
        running.idle_kib = running.kib("VmRSS")
        yield running
    finally:
        process.kill()
        process.communicate()


ALLOW = ["--allow-methods", "random,hip,adakv"]
GOOD = b'{"model": "needle", "prompt": "The dog", "max_tokens": 2}'
WORDS = "The dog watched the old river. " * 40
USER = '{"role":"user","content":"x"}'


def chat(messages: str, more: str = "") -> tuple[str, bytes]:
    return "/v1/chat/completions", f'{{"model":"needle","messages":{messages},"max_tokens":2{more}}}'.encode()


def complete(prompt: str = json.dumps(WORDS), more: str = "") -> tuple[str, bytes]:
    return "/v1/completions", f'{{"model":"needle","prompt":{prompt},"max_tokens":2{more}}}'.encode()


def many(one: str, count: int) -> str:
    return "[" + ",".join([one] * count) + "]"


def calls(arguments: str) -> str:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return json.dumps([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])


def method(spec: str) -> tuple[str, bytes]:
    return complete(more=f',"llm_accel":{{"method":"{spec}"}}')


ABUSES = {
    "n=10**12": lambda: complete(more=f',"n":{10**12}'),
    "n=10**8": lambda: chat(f"[{USER}]", f',"n":{10**8}'),
    "max_tokens=10**12": lambda: complete(more=f',"max_tokens":{10**12}'),
    "seed beyond int64": lambda: complete(more=f',"seed":{2**63}'),
    "top_k of 4000 digits": lambda: complete(more=',"top_k":' + "9" * 4000),
    "temperature of a million digits": lambda: complete(more=',"temperature":' + "9" * 10**6),
    "top_p beyond the floats": lambda: complete(more=',"top_p":1' + "0" * 400),
    "3.5 million numbers as messages": lambda: chat(many("1", 3_500_000)),
    "2.7 million objects as messages": lambda: chat(many("{}", 2_700_000)),
    "2 million texts as messages": lambda: chat(many('""', 2_000_000)),
    "270,000 messages": lambda: chat(many(USER, 270_000)),
    "19,000 messages": lambda: chat(many(USER, 19_000)),
    "200,000 parts": lambda: chat('[{"role":"user","content":' + many('{"type":"text","text":"x"}', 200_000) + "}]"),
    "3.5 million numbers as parts": lambda: chat('[{"role":"user","content":' + many("1", 3_500_000) + "}]"),
    "lists in lists": lambda: chat("[" * 4_000_000),
    "objects in objects": lambda: chat('{"a":' * 1_500_000),
    "a million fields": lambda: complete(more="," + ",".join(f'"{number}":1' for number in range(700_000))),
    "one field a million times": lambda: complete(more=',"user":1' * 800_000),
    "a field with a long name": lambda: complete(more=',"' + "x" * 7_000_000 + '":1'),
    "metadata of 300,000 entries": lambda: complete(
        more=',"metadata":{' + ",".join(f'"{number}":1' for number in range(300_000)) + "}"
    ),
    "a million stop strings": lambda: complete(more=',"stop":' + many('"a"', 1_000_000)),
    "3.5 million numbers as tools": lambda: chat(f"[{USER}]", ',"tools":' + many("1", 3_500_000)),
    "a long model name": lambda: ("/v1/completions", b'{"model":"' + b"x" * 8_000_000 + b'","prompt":"x"}'),
    "1.7 million prompts of a letter": lambda: complete(many('"a"', 1_700_000)),
    "90,000 prompts of a letter": lambda: complete(many('"a"', 90_000)),
    "1.7 million prompts of a token": lambda: complete(many("[1]", 1_700_000)),
    "4 million token ids": lambda: complete(many("1", 4_000_000)),
    "200,000 token ids": lambda: complete(many("1", 200_000)),
    "a prompt of 8 million letters": lambda: complete('"' + "a" * 8_000_000 + '"'),
    "a prompt of 4 million words": lambda: complete('"' + "a " * 4_000_000 + '"'),
    "a prompt of 4 million escapes": lambda: complete('"' + '\\"' * 4_000_000 + '"'),
    "a chat of 4 million words": lambda: chat('[{"role":"user","content":"' + "a " * 4_000_000 + '"}]'),
    "1024 times the prompt's log-probabilities": lambda: complete(more=',"n":1024,"echo":true,"logprobs":20'),
    "1024 long answers with log-probabilities": lambda: (
        "/v1/completions",
        b'{"model":"needle","prompt":"x","max_tokens":9999,"n":1024,"logprobs":20}',
    ),
    "2000 biases": lambda: complete(more=',"logit_bias":{' + ",".join(f'"{token}":1' for token in range(2000)) + "}"),
    "a million stop tokens": lambda: complete(more=',"stop_token_ids":' + many("1", 1_000_000)),
    "arguments of 7 million characters": lambda: chat(calls("[" + "1," * 3_500_000 + "1]")),
    "kernel=10**9+1": lambda: method("snapkv:kernel=1000000001,budget=64"),
    "window=10**9": lambda: method("snapkv:window=1000000000,budget=2000000000"),
    "page=10**9": lambda: method("adakv:page=1000000000,budget=64"),
    "capacity=10**9": lambda: method("dense:capacity=1000000000"),
    "random:seed beyond int64": lambda: method("random:seed=9223372036854775808,budget=64"),
    "a method that is not allowed": lambda: method("h2o:budget=64"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_is_refused_at_once_and_nobody_else_notices(victim: Victim, name: str) -> None:
    path, body = ABUSES[name]()
    assert len(body) < 8 * 2**20, "the size of the body must not be what refuses it"
    for _ in range(ATTEMPTS):
        victim.forget_peak()
        with victim.polled() as health:
            begin = time.perf_counter()
            status, answer = victim.post(path, body)
            seconds = time.perf_counter() - begin
        grown = (victim.kib("VmHWM") - victim.idle_kib) / 1024
        print(f"{name}: {status} in {seconds:.3f} s, /health {health[0]:.3f} s, {grown:+.0f} MiB")
        if seconds < SECONDS and health[0] < HEALTH_SECONDS:
            break
    assert status in (400, 413) and len(answer["error"]["message"]) < 700, answer
    assert seconds < SECONDS and health[0] < HEALTH_SECONDS and grown < MIB
    assert victim.post("/v1/completions", GOOD)[0] == 200


def test_eight_at_a_time_are_refused_too(victim: Victim) -> None:
    """All of them in flight together: what one request costs must not add up either."""
    script = f"""
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", {victim.port}, timeout=60)
connection.request("POST", "/v1/completions", sys.stdin.buffer.read(), {{"Content-Type": "application/json"}})
print(connection.getresponse().status)
"""
    _, body = ABUSES["1.7 million prompts of a letter"]()
    victim.forget_peak()
    senders = [
        subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(8)
    ]
    for sender in senders:
        assert sender.stdin is not None
        sender.stdin.write(body)
        sender.stdin.close()
    statuses = [int(sender.stdout.read()) for sender in senders if sender.stdout is not None]
    for sender in senders:
        sender.wait()
    assert statuses == [400] * 8
    assert (victim.kib("VmHWM") - victim.idle_kib) / 1024 < MIB


def test_what_clients_cause_never_counts_against_health(victim: Victim) -> None:
    """The same mistakes many times over; three failed batches in a row would turn /health to 503."""
    for spec in (
        "random:seed=9223372036854775807,budget=64",
        "random:seed=-9223372036854775808,budget=64",
        "random:window=64",
    ):
        for _ in range(4):
            status, answer = victim.post(*method(spec))
            assert status in (200, 400), answer
    with victim.polled() as health:
        pass
    assert len(health) == 1
