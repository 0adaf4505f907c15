"""Sockets and connections: no delay, no connection that stays open for nothing, a taken port known at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from llm_accel import ConfigError, cli
from llm_accel.serve import loading, middleware, server
from llm_accel.serve.server import bind, listen
from llm_accel.serve.settings import KEY_VARIABLE
from tests.serve.kit import ALICE, Running, wait_for

SOON = 0.3
GET = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n\r\n".encode()


@contextmanager
def bare() -> Iterator[int]:
    """The port of an application that only answers, on uvicorn as it is."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": json.dumps({"data": "x" * 200}).encode()})

    server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def test_models_on_a_kept_connection_within_3_ms_of_bare_uvicorn(running: Running) -> None:
    def ask(connection: http.client.HTTPConnection) -> float:
        begin = time.perf_counter()
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {ALICE}"})
        response = connection.getresponse()
        assert response.status == 200 and response.read()
        return (time.perf_counter() - begin) * 1e3

    with bare() as port:
        ours, theirs = (http.client.HTTPConnection("127.0.0.1", one) for one in (running.port, port))
        for _ in range(4):  # the machine may be busy with something else
            pairs = [(ask(ours), ask(theirs)) for _ in range(60)]
            median, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{median:.2f} ms, bare uvicorn {plain:.2f} ms")
            if median - plain < 3:
                break
        ours.close()
        theirs.close()
    assert median - plain < 3


def test_a_taken_port_is_known_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "load", lambda settings: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert f"--port {port}" in said and "in use" in said and "--port 0" in said
    monkeypatch.setenv(KEY_VARIABLE, ALICE)
    assert cli.main(["serve", "--host", "192.0.2.1", "--port", "0"]) == cli.USAGE_ERROR  # no machine has it
    assert "--host 192.0.2.1" in capsys.readouterr().err


def test_of_two_that_bound_a_port_the_second_is_told() -> None:
    with bind("127.0.0.1", 0) as first, bind("127.0.0.1", first.getsockname()[1]) as second:
        listen(first, 5)
        with pytest.raises(ConfigError, match=f"--port {first.getsockname()[1]}: .*in use"):
            listen(second, 5)


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        yield connection


def closed(connection: socket.socket, drip: bytes = b"") -> bool:
    """Whether the server closes the connection within some seconds, although the client sends on."""
    connection.settimeout(0.05)
    end = time.monotonic() + 15
    while time.monotonic() < end:
        try:
            if not connection.recv(4096):
                return True
        except TimeoutError:
            if drip:
                connection.sendall(drip)
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    ("sent", "drip"),
    [
        (b"", b""),
        (b"", b"G"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nx: ", b"x"),
        (GET, b"G"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{", b" "),  # has no key
    ],
    ids=["nothing", "no line", "no end of the head", "a second head", "a body that is answered already"],
)
def test_half_open_connections_are_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes, drip: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", SOON)
    with connected(running) as connection:
        connection.sendall(sent)
        if sent.endswith(b"\r\n\r\n") or sent.endswith(b"{"):
            assert connection.recv(4096).startswith(b"HTTP/1.1")
        assert closed(connection, drip)
    assert running.complete().status_code == 200


def test_clients_that_do_not_read_are_left(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "READ_SECONDS", SOON)
    before = set(running.server.server_state.connections)

    def others() -> int:
        return len(set(running.server.server_state.connections) - before)

    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.settimeout(20)
        ask = GET.replace(b"/v1/models", b"/openapi.json")
        with contextlib.suppress(OSError):  # closed while it is sending
            connection.sendall(ask * 3000)
        wait_for(lambda: others() == 0)
    assert running.complete().status_code == 200


def test_a_request_that_waits_for_its_answer_is_not_half_open(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", SOON)
    with ThreadPoolExecutor(1) as pool, running.held():
        waiting = pool.submit(running.complete)
        wait_for(running.busy)
        time.sleep(2 * SOON)
        running.brake.set(None)
        assert waiting.result().status_code == 200


def test_a_body_that_does_not_end_is_answered_and_its_connection_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_BODY_SECONDS", SOON)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: 9999\r\n\r\n"
    with connected(running) as connection:
        connection.sendall(head.encode() + b"{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert closed(connection)


@pytest.mark.parametrize("length", [b"9" * 5000, b"1" * 19, b"-1", b"1e3"])
def test_lengths_that_are_none(running: Running, length: bytes) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: ".encode()
    with connected(running) as connection:
        connection.sendall(head + length + b"\r\n\r\n{}")
        assert connection.recv(4096).split(b" ")[1] in (b"400", b"413")
    assert running.complete().status_code == 200
