"""The response that waits for the inference thread: whole or streamed, given up with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from llm_accel.serve.engine import Engine
from llm_accel.serve.errors import ApiError
from llm_accel.serve.responses import ApiResponse


class GenerationResponse(Response):
    """Submits the job when it is called."""

    def __init__(self, engine: Engine, response: ApiResponse) -> None:
        super().__init__()
        self._engine, self._response = engine, response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request to its end, whichever it is."""
        job, answer = self._response.job, self._streamed if self._response.body.stream else self._whole
        try:
            self._engine.submit(job)
            await _unless_gone(receive, answer(scope, receive, send))
        finally:
            self._engine.cancel(job)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = [delta async for delta in self._response.job.deltas()]
        await JSONResponse(self._response.whole(deltas))(scope, receive, send)

    async def _streamed(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        async for delta in self._response.job.deltas():
            if not state["stream"]:
                state["stream"] = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for chunk in self._response.opening():
                    await send(event(chunk))
            await send(event(self._response.chunk(delta)))
        if self._response.body.stream_options.include_usage:
            await send(event(self._response.last()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def event(data: dict[str, Any]) -> dict[str, Any]:
    """A part of a stream."""
    line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    return {"type": "http.response.body", "body": line.encode(), "more_body": True}


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
