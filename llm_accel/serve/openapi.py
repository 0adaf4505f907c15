"""The OpenAPI description of a running server, ``/openapi.json``: with the name of its model and its own limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from llm_accel import __version__
from llm_accel.serve.errors import STATUS
from llm_accel.serve.protocol import ChatRequest, CompletionRequest
from llm_accel.serve.settings import ServeSettings

Json = dict[str, Any]

_REF = "#/components/schemas/"
_JSON = "application/json"


def _object(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_EVENT = _object(data=_TEXT)  # each event of a stream
_FINISH: Json = {"enum": ["stop", "length"]}
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT)


def _answer(name: str, **content: Json) -> Json:
    choice = _object(index=_COUNT, finish_reason=_FINISH, **content)
    return _object(id=_TEXT, object={"const": name}, created=_COUNT, model=_TEXT, choices=_list(choice), usage=_USAGE)


_SCHEMAS: Json = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, code={"enum": list(STATUS)})),
    "ChatResponse": _answer("chat.completion", message=_object(role={"const": "assistant"}, content=_TEXT)),
    "CompletionResponse": _answer("text_completion", text=_TEXT),
    "Model": _MODEL,
    "ModelList": _object(object={"const": "list"}, data=_list({"$ref": _REF + "Model"})),
    "Health": _object(status=_TEXT),
}
_BODIES = {
    "/v1/chat/completions": ("ChatRequest", "ChatResponse"),
    "/v1/completions": ("CompletionRequest", "CompletionResponse"),
}


def describer(app: FastAPI, name: str, settings: ServeSettings, keyed: bool) -> Callable[[], Json]:
    """What ``app.openapi`` becomes.

    Args:
        name: the model, the only one that requests may name.
        keyed: whether the server asks for a key.
    """

    def describe() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, name, settings, keyed)
        return app.openapi_schema

    return describe


def _describe(app: FastAPI, name: str, settings: ServeSettings, keyed: bool) -> Json:
    found = get_openapi(title="llm_accel", version=__version__, routes=app.routes)
    kinds = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, made = models_json_schema(kinds, ref_template=_REF + "{model}")  # type: ignore[arg-type]
    schemas = {**made["$defs"], **_SCHEMAS}
    for request, _ in _BODIES.values():
        properties = schemas[request]["properties"]
        properties["model"] = {"enum": [name]}
        _bound(properties["n"], settings.max_batch)
        _bound(properties["max_tokens"], settings.max_new_tokens)
    _bound(schemas["ChatRequest"]["properties"]["max_completion_tokens"], settings.max_new_tokens)
    methods = ", ".join(sorted(settings.allowed()))
    schemas["Extension"]["properties"]["method"]["description"] = f"with options, and joined by +: {methods}"
    found["components"] = {"schemas": schemas}
    for path, (request, answer) in _BODIES.items():
        operation = found["paths"][path]["post"]
        body = {_JSON: {"schema": {"$ref": _REF + request}}}
        operation["requestBody"] = {"required": True, "content": body}
        operation["responses"] = _responses(_answered(answer) | {"text/event-stream": {"schema": _EVENT}}, *STATUS)
    pages = {
        "/v1/models": _responses(_answered("ModelList"), "unauthorized", "queue_full"),
        "/v1/models/{model_name}": _responses(_answered("Model"), "unauthorized", "not_found", "queue_full"),
        "/health": {status: {"description": "", "content": _answered("Health")} for status in ("200", "503")},
        "/metrics": _responses({"text/plain": {"schema": _TEXT}}, "unauthorized"),
    }
    for path, responses in pages.items():
        found["paths"][path]["get"]["responses"] = responses
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        found["paths"]["/health"]["get"]["security"] = []
    return found


def _bound(schema: Json, limit: int) -> None:
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "integer":
            one["maximum"] = limit


def _answered(name: str) -> Json:
    return {_JSON: {"schema": {"$ref": _REF + name}}}


def _responses(content: Json, *refusals: str) -> Json:
    found = {str(STATUS[name]): {"description": name, "content": _answered("Error")} for name in refusals}
    return {"200": {"description": "ok", "content": content}, **found}
