"""The routes, and how errors leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from llm_accel.serve.body import parse_body
from llm_accel.serve.engine import Engine
from llm_accel.serve.errors import ApiError, deadline_passed
from llm_accel.serve.input_processor import InputProcessor
from llm_accel.serve.loading import Served
from llm_accel.serve.middleware import Middleware
from llm_accel.serve.openapi import describer
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, Request
from llm_accel.serve.responses import ApiResponse
from llm_accel.serve.settings import ServeSettings
from llm_accel.serve.streaming import GenerationResponse

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
    _add_answers(app, engine, processor)
    _add_pages(app, engine, processor, served.name, settings.method)
    _add_errors(app)
    keys = settings.keys()
    app.openapi = describer(app, served.name, settings, bool(keys))  # type: ignore[method-assign]
    max_inside = settings.max_queue + 2 * settings.max_batch  # all that wait, all that run, and some on their way
    middleware = Middleware(
        app, keys, int(settings.max_body_mib * 2**20), processor.max_values, max_inside, engine.metrics
    )
    return middleware, engine


def _add_answers(app: FastAPI, engine: Engine, processor: InputProcessor) -> None:
    async def answer(request: HttpRequest, kind: type[Request], make: Any) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("bad_request", "send JSON with 'Content-Type: application/json'.")
        begin = asyncio.get_running_loop().time()
        body = await asyncio.to_thread(parse_body, kind, await request.body())
        processor.check_model(body.model)
        until = begin + processor.seconds(body)
        with engine.scheduler.place():
            try:
                async with asyncio.timeout_at(until):
                    ready: ApiResponse = await make(body, request.state.key)
            except TimeoutError:
                raise deadline_passed(processor.seconds(body)) from None
        return GenerationResponse(engine, ready, body.stream, body.stream_options.include_usage, until)

    @app.post("/v1/chat/completions")
    async def chat(request: HttpRequest) -> Response:
        return await answer(request, ChatRequest, processor.chat)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        return await answer(request, CompletionRequest, processor.completion)


def _add_pages(app: FastAPI, engine: Engine, processor: InputProcessor, name: str, method: str) -> None:
    started = int(time.time())

    def description() -> dict[str, Any]:
        extension = {"method": method, "context": processor.context}
        return {"id": name, "object": "model", "created": started, "owned_by": "llm_accel", "llm_accel": extension}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [description()]}

    @app.get("/v1/models/{model_name:path}")
    async def one_model(model_name: str) -> dict[str, Any]:
        processor.check_model(model_name)
        return description()

    @app.get("/health")
    async def health() -> JSONResponse:
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
        known = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, /health, /metrics, /openapi.json"
        return JSONResponse(ApiError("not_found", f"there are: {known}.").body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError("error", "the server failed on this request; its log says where.").body(), 500)
