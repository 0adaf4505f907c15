"""More requests than the server can take, clients that leave, batches that fail: each request ends in one outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from benchmarks.common import resident_mib
from llm_accel.serve.input_processor import InputProcessor
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import ALICE, Running, start, wait_for

Pool = Callable[..., "Future[httpx.Response]"]


@contextmanager
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def queued(running: Running, count: int) -> None:
    wait_for(lambda: running.busy() and len(running.server.engine.scheduler) == count)


def test_a_full_queue_says_when_to_come_back(running: Running) -> None:
    with pool() as threads:
        with running.held():
            first = threads.submit(running.complete)
            queued(running, 0)
            waiting = [threads.submit(running.complete) for _ in range(6)]
            queued(running, 6)
            refused = running.complete()
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        assert {future.result().status_code for future in (first, *waiting)} == {200}


def test_deadlines_hold_in_the_queue_the_prompt_and_the_stream(running: Running) -> None:
    soon = {"llm_accel": {"deadline_s": 0.3}}
    with pool() as threads, running.held(permits=1):
        late = threads.submit(running.complete, max_tokens=64)
        wait_for(lambda: running.brake.permits == 0)
        stuck = running.complete(**soon)
        assert stuck.status_code == 504 and "0.3 s" in stuck.text
        assert len(running.server.engine.scheduler) == 0
        running.brake.set(None)
        assert late.result().status_code == 200
    with running.held():
        assert running.complete(**soon).status_code == 504
    later = {"llm_accel": {"deadline_s": 5.0}}  # time enough for the first token on a busy machine
    with running.held(permits=3):
        lines = [line for line in running.complete(stream=True, max_tokens=64, **later).text.split("\n\n") if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline" and len(lines) > 1
    running.idle()
    assert running.complete().status_code == 200


def test_a_client_that_leaves_stops_its_row(running: Running) -> None:
    before = running.metrics()["llm_accel_generated_tokens_total"]
    gone = running.outcomes().get("client_left", 0)
    headers = {"Authorization": f"Bearer {ALICE}"}
    body = {"model": "needle", "prompt": "The dog", "max_tokens": 64, "stream": True}
    with running.held(permits=3):
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, headers=headers) as response:
            assert next(response.iter_lines()).startswith("data: ")
        wait_for(lambda: running.outcomes().get("client_left", 0) == gone + 1)
    running.idle()
    assert running.metrics()["llm_accel_generated_tokens_total"] - before < 10


def test_an_exception_fails_its_batch_only(running: Running) -> None:
    failed = running.metrics()["llm_accel_failed_steps_total"]
    expected = running.complete().json()["choices"]
    running.idle()  # its answer left before its batch was over; a batch that is busy must be that of the next request
    with pool() as threads:
        with running.held():
            first = threads.submit(running.complete)
            queued(running, 0)
            second = [threads.submit(running.complete, llm_accel={"method": "dense"}) for _ in range(2)]
            queued(running, 2)
            running.brake.error = RuntimeError("no memory left")
            # the error waits for the next forward pass, that of the batch which is held now
        results = [future.result() for future in (first, *second)]
    statuses = [response.status_code for response in results]
    assert sorted(statuses) in ([200, 200, 500], [200, 500, 500])
    error = next(response for response in results if response.status_code == 500).json()["error"]
    assert error["code"] == "error" and "no memory left" not in error["message"]
    assert running.metrics()["llm_accel_failed_steps_total"] == failed + 1
    assert running.complete().json()["choices"] == expected


def test_what_fails_outside_of_the_model_is_answered_and_its_text_stays_here(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "a secret"

    def fail(*_: object) -> None:
        raise ValueError(said)

    monkeypatch.setattr(InputProcessor, "check_model", fail)
    before = running.outcomes().get("error", 0)
    response = running.complete()
    assert response.status_code == 500 and response.json()["error"]["code"] == "error"
    assert response.headers["x-request-id"] and running.outcomes()["error"] == before + 1
    assert "a request failed with ValueError" in caplog.text and said not in caplog.text + response.text


def test_a_broken_stream_ends_with_an_error(running: Running) -> None:
    with running.held(permits=3), pool() as threads:
        future = threads.submit(running.complete, stream=True, max_tokens=20)
        wait_for(lambda: running.brake.permits == 0)
        running.brake.error = RuntimeError("lost")
        running.brake.set(None)
        events = [line for line in future.result().text.split("\n\n") if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "error"
    assert "choices" in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize("requests", [24])
def test_outcomes_add_up(running: Running, requests: int) -> None:
    def one(number: int) -> str:
        if number % 6 == 0:
            return str(running.complete(key="key-of-mallory").status_code)
        if number % 6 == 1:
            return str(running.post("/v1/completions", b"{").status_code)
        stream = {"stream": number % 2 == 0, "max_tokens": 1 + number % 5}
        return str(running.complete(**stream).status_code)

    with ThreadPoolExecutor(requests) as threads:
        statuses = list(threads.map(one, range(requests)))
    assert set(statuses) <= {"200", "400", "401", "429"} and statuses.count("401") == requests // 6
    running.idle()
    metrics, outcomes = running.metrics(), running.outcomes()
    received = sum(value for name, value in metrics.items() if name.startswith("llm_accel_requests_received_total"))
    assert received == sum(outcomes.values())
    assert outcomes["unauthorized"] >= statuses.count("401") and outcomes["ok"] >= statuses.count("200")
    assert metrics["llm_accel_queue_depth"] == 0 == metrics["llm_accel_running"]


@pytest.mark.slow
def test_five_hundred_requests_lose_nothing_and_leave_nothing() -> None:
    running = start(tiny_model(), tokenizer(), method="snapkv:budget=40,window=8", allow_methods="h2o", max_batch=8)
    methods = ("snapkv:budget=40,window=8", "dense", "h2o:budget=40")
    sizes: list[float] = []

    def one(number: int) -> tuple[int, str]:
        words = " ".join(["dog", "river", "12", "the"][(number + place) % 4] for place in range(5 + number % 50))
        extension = {"method": methods[number % 3]} | ({"session": f"talk {number % 7}"} if number % 5 == 0 else {})
        answer = running.complete(words, max_tokens=1 + number % 9, ignore_eos=True, llm_accel=extension)
        sizes.append(resident_mib(os.getpid()))
        return answer.status_code, answer.json()["choices"][0]["text"]

    try:
        with ThreadPoolExecutor(32) as threads:
            first = list(threads.map(one, range(250)))
            half = max(sizes)
            second = list(threads.map(one, range(250)))
        assert {status for status, _ in first + second} == {200}
        alone = [one(number) for number in range(0, 250, 25) if number % 5]
        assert alone == [second[number] for number in range(0, 250, 25) if number % 5]
        running.idle()
        engine = running.server.engine
        assert not engine._groups and not engine.running and len(engine._conversations) == 7
        assert max(sizes[250:500]) < half + 30, "memory of the process, MiB"
    finally:
        running.stop()
