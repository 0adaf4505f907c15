"""The routes."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from llm_accel import __version__
from llm_accel.serve.body import parse_body
from llm_accel.serve.engine import Engine
from llm_accel.serve.errors import ApiError, BadRequest
from llm_accel.serve.input_processor import InputProcessor
from llm_accel.serve.loading import Served
from llm_accel.serve.middleware import Middleware
from llm_accel.serve.openapi import PROBE, add_description, answers, takes
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, ModelRequest, TokenizeRequest
from llm_accel.serve.settings import ServeSettings
from llm_accel.serve.streaming import GenerationResponse

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=ModelRequest)

_MOST_NAMES = 32  # of ignored fields that are reported
_STOP_S = 10.0  # what a batch has to notice that nobody waits for it


def create_app(served: Served, settings: ServeSettings) -> tuple[FastAPI, Engine]:
    """The application, and the engine behind it, which starts and stops with it.

    Raises:
        LlmAccelError: the keys or the default method cannot be used.
    """
    engine = Engine(served, settings)
    processor = InputProcessor(served, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.thread.start()
        yield
        engine.abandon()
        await asyncio.to_thread(engine.thread.join, _STOP_S)

    app = FastAPI(title="llm_accel", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_answers(app, engine, processor, Inbox(engine, processor, settings))
    _add_pages(app, engine, processor, served.name, settings.method)
    keys = settings.keys()
    add_description(app, served.name, settings, bool(keys))
    app.add_middleware(
        Middleware,
        keys=keys,
        max_body=int(settings.max_body_mib * 2**20),
        max_values=processor.max_values,
        max_inside=settings.max_queue + 2 * settings.max_batch,  # all that wait or run, and some on their way
        metrics=engine.metrics,
    )
    return app, engine


class Inbox:
    """Reads and checks the bodies of requests. Unknown fields are refused where the settings say so; otherwise they are
    ignored, and named in a header of the response."""

    def __init__(self, engine: Engine, processor: InputProcessor, settings: ServeSettings) -> None:
        self._engine, self._processor, self._settings = engine, processor, settings
        self._warned: set[str] = set()

    @asynccontextmanager
    async def opened(self, request: HttpRequest, kind: type[Kind]) -> AsyncIterator[Kind]:
        """The body, which has a place in the queue until it is made into something; its time begins."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("send JSON with 'Content-Type: application/json'.")
        begin = asyncio.get_running_loop().time()
        ignored: set[str] | None = None if self._settings.strict_fields else set()
        body = await asyncio.to_thread(parse_body, kind, request.state.body, ignored)
        self._report(request, ignored or set())
        if body.model is not None:
            self._processor.check_model(body.model)
        seconds = min(body.llm_accel.deadline_s or math.inf, self._settings.deadline_s)
        request.state.late = ApiError("deadline", f"not finished within {seconds:g} s.")
        request.state.timeout.reschedule(begin + seconds)
        with self._engine.scheduler.reserve():
            yield body

    def _report(self, request: HttpRequest, ignored: set[str]) -> None:
        names = sorted({re.sub(r"[^\w.-]", "?", name[:40], flags=re.ASCII) for name in ignored})[:_MOST_NAMES]
        if names:
            request.state.headers.append((b"x-llm-accel-ignored", ", ".join(names).encode()))
        for name in names:
            if name not in self._warned and len(self._warned) < _MOST_NAMES:
                self._warned.add(name)
                log.warning("a request has the field %r, which is not known here and ignored", name)


def _add_answers(app: FastAPI, engine: Engine, processor: InputProcessor, inbox: Inbox) -> None:
    @app.post("/v1/chat/completions", **takes(ChatRequest), **answers("ChatResponse", streams=True))
    async def chat(request: HttpRequest) -> Response:
        async with inbox.opened(request, ChatRequest) as body:
            return GenerationResponse(engine, await processor.generation(body, request.state.key))

    @app.post("/v1/completions", **takes(CompletionRequest), **answers("CompletionResponse", streams=True))
    async def completions(request: HttpRequest) -> Response:
        async with inbox.opened(request, CompletionRequest) as body:
            return GenerationResponse(engine, await processor.generation(body, request.state.key))

    @app.post("/tokenize", **takes(TokenizeRequest), **answers("Tokens"))
    async def tokenize(request: HttpRequest) -> JSONResponse:
        async with inbox.opened(request, TokenizeRequest) as body:
            return JSONResponse(await processor.tokenize(body))

    @app.post("/detokenize", **takes(DetokenizeRequest), **answers("Text"))
    async def detokenize(request: HttpRequest) -> JSONResponse:
        async with inbox.opened(request, DetokenizeRequest) as body:
            return JSONResponse(await processor.detokenize(body))


def _add_pages(app: FastAPI, engine: Engine, processor: InputProcessor, name: str, method: str) -> None:
    known = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "llm_accel"}
    extension = {"method": method, "context": processor.context}
    description = known | {"max_model_len": processor.context, "llm_accel": extension}

    @app.get("/v1/models", **answers("ModelList"))
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [description]})

    @app.get("/v1/models/{model_name:path}", **answers("Model"))
    async def one_model(model_name: str) -> JSONResponse:
        processor.check_model(model_name)
        return JSONResponse(description)

    @app.get("/version", **answers("Version"))
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    @app.get("/live", **PROBE)
    async def live() -> JSONResponse:
        alive = engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "not running"}, 200 if alive else 503)

    @app.get("/ready", **PROBE)
    @app.get("/health", **PROBE)
    async def ready() -> JSONResponse:
        return JSONResponse({"status": engine.status}, 200 if engine.status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse, **answers())
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def elsewhere(request: HttpRequest, error: Any) -> JSONResponse:
        message = (
            "there is no such path or method here; this server has POST /v1/chat/completions, /v1/completions, "
            "/tokenize, /detokenize, GET /v1/models, /version, /live, /ready, /health, /metrics, /openapi.json."
        )
        return JSONResponse(ApiError("not_found", message).body(), error.status_code, error.headers)
