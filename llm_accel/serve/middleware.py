"""The outermost layer: key, size, outcome. Every request is counted here, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_accel.serve.body import ValueCounter
from llm_accel.serve.errors import STATUS, ApiError
from llm_accel.serve.metrics import Metrics
from llm_accel.serve.settings import is_loopback
from llm_accel.serve.streaming import event

log = logging.getLogger(__name__)

PROBES = ("/live", "/ready", "/health")  # need no key
_UNCOUNTED = (*PROBES, "/metrics")  # asked every few seconds
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/version")
_OUTCOMES = {status: outcome for outcome, status in STATUS.items()}
_BODY_SECONDS, _LAST_SECONDS = 30.0, 1.0  # for a body to arrive, and for the end of a stream to leave
_LATE = ApiError(
    "body_timeout", f"the request took longer than {_BODY_SECONDS:.0f} s to arrive.", {"Connection": "close"}
)
_DIGITS = 18  # of a length
_DISCARD, _DISCARD_SECONDS = 4, 2.0  # times the largest body
_PORT = re.compile(r":\d+$")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


class Middleware:
    """ASGI application around another one.

    Args:
        app: what is behind.
        keys: bearer keys; with none, requests must name a loopback address as their host, so that no page in a browser
            reaches the server under a name of its own.
        max_body: bytes of a request at most.
        max_values: values in the JSON of a request at most.
        max_inside: requests inside at a time at most, so that bodies together are bounded too.
        metrics: where requests are counted.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], max_body: int, max_values: int, max_inside: int, metrics: Metrics
    ) -> None:
        self._app, self._metrics = app, metrics
        self._max_body, self._max_values, self._max_inside = max_body, max_values, max_inside
        self._inside = 0
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on. ``scope["state"]`` has its ``key`` and ``body``, and what the application changes: the
        ``headers`` that its response gets beside its own, the ``timeout`` after which it is ``late``, and whether it is
        a ``stream`` of events, of which an error is the last."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers, begin = scope["path"], dict(scope["headers"]), time.monotonic()
        endpoint = next((known for known in _ENDPOINTS if path == known or path.startswith(known + "/")), "other")
        given = headers.get(b"x-request-id", b"")
        number = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state |= {"outcome": None, "headers": [(b"x-request-id", number)], "late": _LATE, "stream": False}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                state["outcome"] = _OUTCOMES.get(status, "ok" if status < 400 else "bad_request")
                message["headers"] = [*message.get("headers", ()), *state["headers"]]
            await send(message)

        if path not in _UNCOUNTED:
            self._metrics.received.labels(endpoint).inc()
        self._inside += 1
        try:
            await self._pass(scope, headers, receive, watched)
        finally:
            self._inside -= 1
            if path not in _UNCOUNTED:
                outcome = state["outcome"] or "error"
                self._metrics.requests.labels(endpoint, outcome).inc()
                log.info("%s %s %.3f s %s", endpoint, outcome, time.monotonic() - begin, number.decode())

    async def _pass(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        state, path = scope["state"], scope["path"]
        try:
            async with asyncio.timeout(_BODY_SECONDS) as state["timeout"]:
                if path not in PROBES:
                    state["key"] = self._key(headers)
                if self._inside > self._max_inside and path not in _UNCOUNTED:
                    raise ApiError("queue_full", "too many requests at a time; try again.", {"Retry-After": "1"})
                state["body"] = await self._body(headers, receive)
                state["timeout"].reschedule(None)
                await self._app(scope, receive, send)
            return
        except ApiError as error:
            refusal = error
        except TimeoutError:
            refusal = state["late"]
        except Exception as error:  # its text may quote the request, so only its place is logged
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("a request failed with %s\n%s", type(error).__name__, frames)
            refusal = ApiError("error", "the server failed on this request; its log says where.")
        if state["outcome"] is None:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
        elif state["stream"] and refusal.outcome != "client_left":
            with contextlib.suppress(TimeoutError):  # a client that does not read must not hold the server
                async with asyncio.timeout(_LAST_SECONDS):
                    await send(event(refusal.body()) | {"more_body": False})
        state["outcome"] = refusal.outcome

    def _key(self, headers: dict[bytes, bytes]) -> str:
        """Which key the request carries; the same work for every key, right or wrong."""
        if not self._digests:
            host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1"))
            if not is_loopback(host):
                raise ApiError("unauthorized", "a server without a key answers only to localhost, 127.0.0.1 or [::1].")
            return ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(found):
            raise ApiError(
                "unauthorized",
                "send a valid key as 'Authorization: Bearer KEY'.",
                {"WWW-Authenticate": "Bearer"},
                "invalid_api_key",
            )
        return str(found.index(True))

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        too_large = ApiError("too_large", f"a request may have {self._max_body} bytes.", {"Connection": "close"})
        length = headers.get(b"content-length", b"0")
        body, counter, more = bytearray(), ValueCounter(self._max_values), True
        try:
            if not length.isdigit() or len(length) > _DIGITS or int(length) > self._max_body:
                raise too_large
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("client_left", "the connection was closed before the request was complete.")
                chunk = message.get("body", b"")
                body += chunk
                more = message.get("more_body", False)
                if len(body) > self._max_body:
                    raise too_large
                counter.add(chunk)
        except ApiError:
            body.clear()
            if more:
                await self._discard(receive)
            raise
        return bytes(body)

    async def _discard(self, receive: Receive) -> None:
        """Reads on for a while without keeping anything: a client that still sends would not see the answer."""
        left, more = _DISCARD * self._max_body, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while more and left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)
