"""The OpenAPI description of a running server, ``/openapi.json``: with the name of its model and its own limits."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from llm_accel.serve.errors import STATUS
from llm_accel.serve.input_processor import MOST_ANSWERS
from llm_accel.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, ModelRequest, TokenizeRequest
from llm_accel.serve.settings import ServeSettings

Json = dict[str, Any]

_REF = "#/components/schemas/"
_REQUESTS = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_LENGTHS = ("max_tokens", "max_completion_tokens", "min_tokens")


def _object(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_LENGTH: Json = {"type": ["integer", "null"]}
_FINISH: Json = {"enum": ["stop", "length"]}
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)


def _answer(name: str, **content: Json) -> Json:
    choice = _object(index=_COUNT, finish_reason=_FINISH, **content)
    return _object(id=_TEXT, object={"const": name}, created=_COUNT, model=_TEXT, choices=_list(choice), usage=_USAGE)


_SCHEMAS: Json = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, code=_TEXT)),
    "ChatResponse": _answer("chat.completion", message=_object(role={"const": "assistant"}, content=_TEXT)),
    "CompletionResponse": _answer("text_completion", text=_TEXT),
    "Tokens": _object(count=_COUNT, max_model_len=_LENGTH, tokens=_list(_COUNT)),
    "Text": _object(prompt=_TEXT),
    "Version": _object(version=_TEXT),
    "Model": _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_LENGTH),
    "ModelList": _object(object={"const": "list"}, data=_list({"$ref": _REF + "Model"})),
    "Health": _object(status=_TEXT),
}


def _content(name: str) -> Json:
    return {"application/json": {"schema": {"$ref": _REF + name}}}


_REFUSALS = {status: {"description": name, "content": _content("Error")} for name, status in STATUS.items()}
PROBE: Json = {  # of a route that needs no key
    "responses": {status: {"description": "", "content": _content("Health")} for status in (200, 503)},
    "openapi_extra": {"security": []},
}


def takes(request: type[ModelRequest]) -> Json:
    """What says of a route that its requests are of this kind."""
    return {"openapi_extra": {"requestBody": {"required": True, "content": _content(request.__name__)}}}


def answers(name: str | None = None, streams: bool = False) -> Json:
    """What says of a route that it has these responses, or refuses."""
    content = {} if name is None else _content(name)
    content |= {"text/event-stream": {"schema": _object(data=_TEXT)}} if streams else {}
    return {"responses": {200: {"description": "ok", "content": content}, **_REFUSALS}}


def add_description(app: FastAPI, name: str, settings: ServeSettings, keyed: bool) -> None:
    """Makes ``/openapi.json`` say what this server takes.

    Args:
        name: the model, the only one that requests may name.
        keyed: whether the server asks for a key.
    """

    @functools.cache
    def describe() -> Json:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        found["components"] = {"schemas": _requests(name, settings) | _SCHEMAS}
        del found["paths"]["/v1/models/{model_name}"]["get"]["responses"]["422"]  # any text is one
        if keyed:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
        return found

    app.openapi = describe  # type: ignore[method-assign]


def _requests(name: str, settings: ServeSettings) -> Json:
    """The schemas of requests, with the limits of this server."""
    kinds: Any = [(request, "validation") for request in _REQUESTS]
    _, made = models_json_schema(kinds, ref_template=_REF + "{model}")
    schemas: Json = made["$defs"]
    for request in _REQUESTS:
        properties = schemas[request.__name__]["properties"]
        properties["model"] = {"enum": [name]}
        for field, limit in (("n", MOST_ANSWERS), *((key, settings.max_new_tokens) for key in _LENGTHS)):
            for one in properties.get(field, {}).get("anyOf", ()):
                if limit is not None and one.get("type") == "integer":
                    one["maximum"] = limit
    if not settings.strict_fields:
        for schema in schemas.values():
            schema.pop("additionalProperties", None)
    methods = ", ".join(sorted(settings.allowed()))
    schemas["Extension"]["properties"]["method"]["description"] = f"with options, and joined by +: {methods}"
    return schemas
