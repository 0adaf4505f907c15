"""``llm-accel bench serve`` against a server of a few lines whose times and failures are known."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llm_accel import ConfigError, cli
from llm_accel.eval.tasks.bench_serve.client import Timing
from llm_accel.eval.tasks.bench_serve.load import make_load
from llm_accel.eval.tasks.bench_serve.settings import BenchServeSettings
from llm_accel.eval.tasks.bench_serve.summary import summarize

FIRST, GAP = 0.05, 0.02
ANYWHERE = ("a=http://127.0.0.1:1/v1",)


class FakeServer(ThreadingHTTPServer):
    """Streams as many pieces as it is asked for; counts how many requests are open; ``fault``: what it does wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.open = self.most = 0
        self.fault = ""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._head(200)
        self.wfile.write(json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            self.server.open += 1
            self.server.most = max(self.server.most, self.server.open)
        self._answer(body)
        with self.server.lock:
            self.server.open -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if self.server.fault == "refuses":
            self._head(429)
            self.wfile.write(b'{"error": {"message": "later"}}')
            return
        self._head(200)
        if not body["stream"]:
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            self.wfile.write(json.dumps({"choices": [{"text": "xxx"}], "usage": usage}).encode())
            return
        time.sleep(FIRST)
        for number in range(body["max_tokens"]):
            time.sleep(GAP if number else 0)
            piece = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
            self._event({"choices": [piece]})
        if self.server.fault == "breaks":
            return
        if self.server.fault == "fails":
            self._event({"error": {"message": "out of memory"}})
            return
        if self.server.fault != "counts nothing":
            self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}})
        if self.server.fault == "says no more":
            self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        else:
            self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """Table and JSON line."""
    assert cli.main(["bench", "serve", *arguments]) == 0, capsys.readouterr().err
    table, _, line = capsys.readouterr().out.strip().rpartition("\n")
    return table, json.loads(line)


# --- load ------------------------------------------------------------------------------------------------------------


def test_lengths_come_in_the_shares_of_their_weights():
    load = make_load(BenchServeSettings(servers=ANYWHERE, prompt_words=("4:1", "9:3"), new_tokens=("1:1", "5:1")))
    assert Counter(len(planned.body["prompt"].split()) for planned in load) == {4: 12, 9: 36}
    assert Counter(planned.body["max_tokens"] for planned in load) == {1: 24, 5: 24}


def test_a_seed_is_a_load_and_prompts_share_only_what_they_should():
    settings = BenchServeSettings(servers=ANYWHERE, shared_words=30, prompt_words=("40:1",))
    load, again = make_load(settings), make_load(settings)
    other = make_load(BenchServeSettings(servers=ANYWHERE, shared_words=30, prompt_words=("40:1",), seed=1))
    prompts = [planned.body["prompt"].split() for planned in load]
    assert load == again != other
    assert len({tuple(words[:30]) for words in prompts}) == 1 and len({tuple(words[30:]) for words in prompts}) == 48


def test_open_loop_times_have_the_given_rate():
    load = make_load(BenchServeSettings(servers=ANYWHERE, rate=50.0, requests=2000, prompt_words=("1:1",)))
    times = [planned.at for planned in load]
    assert times == sorted(times) and times[-1] == pytest.approx(2000 / 50.0, rel=0.1)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_the_given_number_open(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    arguments = ["--requests", "12", "--in-flight", "3", "--new-tokens", "3", "--warmup", "1", "--out"]
    table, line = bench(capsys, "--url", f"one={fake.url}", *arguments, str(tmp_path / "out.json"))
    figures = line["servers"]["one"]
    assert fake.most == 3 and len(fake.bodies) == 13 and figures["outcomes"] == {"ok": 12}
    assert FIRST <= figures["first_token_s"]["p50"] <= FIRST + 0.2
    assert GAP <= figures["between_tokens_s"]["p50"] <= GAP + 0.1 and figures["longest_gap_s"]["p50"] >= GAP
    assert figures["new_tokens_per_s"] == pytest.approx(36 / figures["wall_s"])
    assert figures["prompt_tokens_per_s"] == pytest.approx(84 / figures["wall_s"])
    assert table.splitlines()[2].split()[:2] == ["one", "12/12"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["rounds"]["one"][0]["requests"]) == 12 and written["settings"]["in_flight"] == 3
    assert {one["text"] for one in written["rounds"]["one"][0]["requests"]} == {"xxx"}


def test_an_open_loop_waits_for_nobody(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    _, line = bench(
        capsys, "--url", f"one={fake.url}", "--requests", "8", "--rate", "500", "--new-tokens", "6", "--warmup", "0"
    )
    assert fake.most >= 6 and line["servers"]["one"]["wall_s"] < 8 * (FIRST + 5 * GAP)


def test_servers_take_turns_with_the_same_load(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    arguments = ["--requests", "3", "--in-flight", "1", "--new-tokens", "1", "--rounds", "2", "--warmup", "0"]
    _, line = bench(capsys, "--url", f"a={fake.url}", "--url", f"b={fake.url}", *arguments)
    prompts = [body["prompt"] for body in fake.bodies]
    assert prompts == prompts[:3] * 4 and {name: f["outcomes"]["ok"] for name, f in line["servers"].items()} == {
        "a": 6,
        "b": 6,
    }


def test_chat_model_name_and_further_fields(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    bench(
        capsys, "--url", fake.url, "--requests", "1", "--warmup", "0", "--endpoint", "chat", "--model", "mine",
        "--new-tokens", "2", "--body", '{"llm_accel": {"method": "dense"}, "max_tokens": 1}',
    )  # fmt: skip
    (body,) = fake.bodies
    assert fake.paths == ["/v1/chat/completions"] and body["messages"][0]["role"] == "user"
    assert body["model"] == "mine" and body["llm_accel"] == {"method": "dense"} and body["max_tokens"] == 1


def test_an_answer_that_is_not_streamed_has_no_first_piece(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    _, line = bench(capsys, "--url", f"a={fake.url}", "--requests", "2", "--warmup", "0", "--body", '{"stream": false}')
    figures = line["servers"]["a"]
    assert figures["outcomes"] == {"ok": 2} and figures["first_token_s"] == {} and figures["request_s"]["p50"] > 0
    assert figures["new_tokens_per_s"] == pytest.approx(6 / figures["wall_s"])


def test_pieces_count_where_the_server_counts_nothing(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    fake.fault = "counts nothing"
    _, line = bench(capsys, "--url", f"a={fake.url}", "--requests", "2", "--new-tokens", "4", "--warmup", "0")
    figures = line["servers"]["a"]
    assert figures["new_tokens_per_s"] == pytest.approx(8 / figures["wall_s"])


def test_no_time_between_tokens_where_there_is_one():
    alone = Timing(first=1.0, seconds=1.5, new_tokens=1)
    pair = Timing(first=1.0, seconds=1.5, new_tokens=2)
    assert alone.between is None and pair.between == 0.5
    assert summarize([([alone, pair], 2.0)])["between_tokens_s"]["p99"] == 0.5


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_finish_reason_ends_a_stream_too(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    fake.fault = "says no more"
    _, line = bench(capsys, "--url", f"a={fake.url}", "--requests", "1", "--warmup", "0")
    assert line["servers"]["a"]["outcomes"] == {"ok": 1}


@pytest.mark.parametrize(
    ("fault", "outcome", "message"),
    [("refuses", "429", "later"), ("breaks", "broken stream", "xx"), ("fails", "error in the stream", "out of memory")],
)
def test_failures_are_counted_and_shown(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], fault: str, outcome: str, message: str
):
    fake.fault = fault
    table, line = bench(capsys, "--url", f"a={fake.url}", "--requests", "2", "--new-tokens", "2", "--warmup", "0")
    figures = line["servers"]["a"]
    assert figures["outcomes"] == {outcome: 2} and figures["new_tokens_per_s"] == 0 and figures["request_s"] == {}
    assert f"a: 2 x {outcome}" in table and message in table


def test_all_servers_are_asked_before_the_first_gets_its_load(fake: FakeServer, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "serve", "--url", f"a={fake.url}", "--url", "b=http://127.0.0.1:1/v1"]) == 2
    assert "http://127.0.0.1:1/v1: GET" in capsys.readouterr().err and fake.bodies == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no server is given"),
        (["--url", "localhost:8000"], "give an address such as"),
        (["--url", "a=http://x/v1", "--url", "a=http://y/v1"], "two servers called 'a'"),
        (["--url", "http://x/v1", "--rate", "2", "--in-flight", "2"], "give one"),
        (["--url", "http://x/v1", "--new-tokens", "16:0"], "for example 16:3,192:1"),
        (["--url", "http://x/v1", "--prompt-words", "50,20", "--shared-words", "21"], "has only 20 words"),
        (["--url", "http://x/v1", "--body", "[1]"], "give a JSON object"),
        (["--url", "http://x/v1", "--body", "{"], "is no JSON"),
        (["--url", "http://x/v1", "--requests", "0"], "at least 1"),
    ],
)
def test_wrong_arguments(given: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "serve", *given]) == 2
    assert message in capsys.readouterr().err


def test_settings_read_back():
    settings = BenchServeSettings(servers=ANYWHERE, rate=2.0)
    assert BenchServeSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ConfigError):
        BenchServeSettings.from_dict({"servers": ANYWHERE, "nothing": 1})
