"""The response that waits for the inference thread: whole or streamed, with a deadline, given up with its client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llm_accel.serve.engine import Engine
from llm_accel.serve.errors import ApiError, deadline_passed
from llm_accel.serve.responses import ApiResponse


class GenerationResponse(Response):
    """Submits the job when it is called. Errors before the first byte leave as :class:`ApiError`, later ones end the
    stream with an event that says so. The state of the request has ``until``, the deadline as the loop counts time."""

    def __init__(self, engine: Engine, response: ApiResponse) -> None:
        super().__init__()
        self._engine, self._response = engine, response
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request to its end, whichever it is."""
        job = self._response.job
        try:
            self._engine.submit(job)
            async with asyncio.timeout_at(scope["state"]["until"]):
                streamed = self._response.body.stream
                await _unless_gone(receive, self._streamed(send) if streamed else self._whole(scope, receive, send))
        except TimeoutError:
            await self._refuse(deadline_passed(job.deadline_s), scope, send)
        except ApiError as error:
            await self._refuse(error, scope, send)
        finally:
            self._engine.cancel(job)

    async def _refuse(self, error: ApiError, scope: Scope, send: Send) -> None:
        if not self._started:
            raise error
        scope["state"]["outcome"] = error.outcome
        if error.outcome != "client_left":
            with contextlib.suppress(TimeoutError):  # a client that does not read must not hold the server
                async with asyncio.timeout(1):
                    await _event(send, error.body())
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = [delta async for delta in self._response.job.deltas()]
        self._started = True
        await JSONResponse(self._response.whole(deltas))(scope, receive, send)

    async def _streamed(self, send: Send) -> None:
        async for delta in self._response.job.deltas():
            if not self._started:
                self._started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for chunk in self._response.opening():
                    await _event(send, chunk)
            await _event(send, self._response.chunk(delta))
        if self._response.body.stream_options.include_usage:
            await _event(send, self._response.last())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _event(send: Send, data: dict[str, Any]) -> None:
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, unless the client closes the connection first: then the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("client_left", "the connection was closed.")
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
