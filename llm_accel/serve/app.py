"""The routes, and how errors leave."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_accel import __version__
from llm_accel.serve.body import parse_body
from llm_accel.serve.engine import Engine
from llm_accel.serve.errors import ApiError, BadRequest, deadline_passed
from llm_accel.serve.input_processor import InputProcessor
from llm_accel.serve.loading import Served
from llm_accel.serve.middleware import Middleware
from llm_accel.serve.openapi import add_description
from llm_accel.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ModelRequest,
    TokenizeRequest,
)
from llm_accel.serve.settings import ServeSettings
from llm_accel.serve.streaming import GenerationResponse

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=ModelRequest)
Result = TypeVar("Result")

_MOST_NAMES = 32  # of ignored fields that are reported
_STOP_S = 10.0  # what a batch has to notice that nobody waits for it


def create_app(served: Served, settings: ServeSettings) -> tuple[Middleware, Engine]:
    """The application, and the engine behind it, which starts and stops with it.

    Raises:
        LlmAccelError: the keys or the default method cannot be used.
    """
    engine = Engine(served, settings)
    processor = InputProcessor(served, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.abandon()
        await asyncio.to_thread(engine.join, _STOP_S)

    app = FastAPI(title="llm_accel", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_answers(app, engine, processor, Inbox(engine, processor, settings.strict_fields))
    _add_pages(app, engine, processor, served.name, settings.method)
    _add_errors(app)
    keys = settings.keys()
    add_description(app, served.name, settings, bool(keys))
    max_inside = settings.max_queue + 2 * settings.max_batch  # all that wait, all that run, and some on their way
    middleware = Middleware(
        app, keys, int(settings.max_body_mib * 2**20), processor.max_values, max_inside, engine.metrics
    )
    return middleware, engine


class Inbox:
    """Reads and checks the bodies of requests.

    Args:
        strict: whether unknown fields are refused; they are ignored otherwise, and named in a header of the response.
    """

    def __init__(self, engine: Engine, processor: InputProcessor, strict: bool) -> None:
        self._engine, self._processor, self._strict = engine, processor, strict
        self._warned: set[str] = set()

    async def read(
        self, request: HttpRequest, kind: type[Kind], make: Callable[[Kind], Awaitable[Result]]
    ) -> tuple[Result, float]:
        """What ``make`` makes of the body, with a place in the queue, and when its time is over."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("send JSON with 'Content-Type: application/json'.")
        begin = asyncio.get_running_loop().time()
        ignored: set[str] | None = None if self._strict else set()
        body = await asyncio.to_thread(parse_body, kind, request.state.body, ignored)
        self._report(request, ignored or set())
        if body.model is not None:
            self._processor.check_model(body.model)
        seconds = self._processor.seconds(body)
        with self._engine.scheduler.reserve():
            try:
                async with asyncio.timeout_at(begin + seconds):
                    return await make(body), begin + seconds
            except TimeoutError:
                raise deadline_passed(seconds) from None

    def _report(self, request: HttpRequest, ignored: set[str]) -> None:
        names = sorted({re.sub(r"[^\w.-]", "?", name[:40], flags=re.ASCII) for name in ignored})[:_MOST_NAMES]
        if names:
            request.state.headers.append((b"x-llm-accel-ignored", ", ".join(names).encode()))
        for name in names:
            if name not in self._warned and len(self._warned) < _MOST_NAMES:
                self._warned.add(name)
                log.warning("a request has the field %r, which is not known here and ignored", name)


def _add_answers(app: FastAPI, engine: Engine, processor: InputProcessor, inbox: Inbox) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: HttpRequest) -> Response:
        answer, until = await inbox.read(request, ChatRequest, lambda body: processor.chat(body, request.state.key))
        return GenerationResponse(engine, answer, until)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        made = await inbox.read(request, CompletionRequest, lambda body: processor.completion(body, request.state.key))
        return GenerationResponse(engine, *made)

    @app.post("/tokenize")
    async def tokenize(request: HttpRequest) -> JSONResponse:
        made, _ = await inbox.read(request, TokenizeRequest, processor.tokenize)
        return JSONResponse(made)

    @app.post("/detokenize")
    async def detokenize(request: HttpRequest) -> JSONResponse:
        made, _ = await inbox.read(request, DetokenizeRequest, processor.detokenize)
        return JSONResponse(made)


def _add_pages(app: FastAPI, engine: Engine, processor: InputProcessor, name: str, method: str) -> None:
    started = int(time.time())

    def description() -> dict[str, Any]:
        extension = {"method": method, "context": processor.context}
        known = {"id": name, "object": "model", "created": started, "owned_by": "llm_accel"}
        return known | {"max_model_len": processor.context, "llm_accel": extension}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description()]}

    @app.get("/v1/models/{model_name:path}")
    async def one_model(model_name: str) -> dict[str, Any]:
        processor.check_model(model_name)
        return description()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "ok"}) if engine.working else JSONResponse({"status": "not running"}, 503)

    @app.get("/ready")
    @app.get("/health")
    async def ready() -> JSONResponse:
        return JSONResponse({"status": engine.status}, 200 if engine.status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: HttpRequest, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def elsewhere(request: HttpRequest, error: Any) -> JSONResponse:
        message = (
            "there is no such path or method here; this server has POST /v1/chat/completions, /v1/completions, "
            "/tokenize, /detokenize, GET /v1/models, /version, /live, /ready, /health, /metrics, /openapi.json."
        )
        return JSONResponse(ApiError("not_found", message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError("error", "the server failed on this request; its log says where.").body(), 500)
