"""The body of a request: counted while it arrives, so that what is parsed is bounded; then JSON; then checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from llm_accel.serve.errors import BadRequest
from llm_accel.serve.protocol import LARGE_ENGINE

MOST_PARTS = 100_000  # texts, lists and objects of a request
_STEP = 40  # characters of a name in a message

Model = TypeVar("Model", bound=BaseModel)


class ValueCounter:
    """Counts the values of a JSON text chunk by chunk, at the speed of :meth:`bytes.split`. It reads no JSON: what is
    none is left to the parser, which stops there.

    Args:
        most_values: values of a list or an object, over all of them, at most.
    """

    def __init__(self, most_values: int) -> None:
        self._most_values = most_values
        self._commas = self._quotes = self._openings = 0
        self._escaped = False  # the next byte belongs to an escape

    def add(self, chunk: bytes) -> None:
        """Counts the next chunk.

        Raises:
            BadRequest: there are more values than any request needs.
        """
        if not chunk:
            return
        chunk = chunk[1:] if self._escaped else chunk
        self._escaped = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 == 1
        if b"\\" in chunk:  # escaped quotes end no string
            chunk = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
        runs = chunk.split(b'"')
        outside = b"".join(runs[self._quotes % 2 :: 2])
        self._quotes += len(runs) - 1
        self._commas += outside.count(b",")
        self._openings += outside.count(b"[") + outside.count(b"{")
        if self._openings + self._quotes // 2 > MOST_PARTS:
            raise BadRequest(f"the JSON has over {MOST_PARTS} texts, lists and objects; send fewer.")
        if self._commas > self._most_values:
            raise BadRequest(f"the JSON has over {self._most_values} values; send fewer.")


def parse_body(kind: type[Model], body: bytes, ignored: set[str] | None = None) -> Model:
    """A checked request.

    Args:
        ignored: where names of unknown fields go; None refuses them.

    Raises:
        BadRequest: it is no JSON or not as described; says what is wrong first, and where.
    """
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise BadRequest(f"the body is no valid JSON: {error}.") from None
    try:
        return kind.model_validate(data, context={"ignored": ignored})
    except ValidationError as error:
        raise _refusal(error, data) from None


_SAYS = {
    "bool_type": "give true or false",
    "dict_type": "give an object",
    "extra_forbidden": "unknown, or not supported with this value",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "give a number above {gt}",
    "greater_than_equal": "give at least {ge}",
    "int_type": "give an integer",
    "less_than_equal": "give at most {le}",
    "list_type": "give a list",
    "literal_error": "give {expected}",
    "missing": "is missing",
    "model_attributes_type": "give an object",
    "model_type": "give an object",
    "string_pattern_mismatch": "give token ids as its keys",
    "string_too_long": "give at most {max_length} characters",
    "string_too_short": "give at least {min_length} characters",
    "string_type": "give a text",
    "too_long": "give at most {max_length} items",
    "too_short": "give at least {min_length} items",
    "union_tag_invalid": "give {expected_tags} as the 'type'",
    "union_tag_not_found": "give an object with a 'type'",
}


def _refusal(error: ValidationError, data: Any) -> BadRequest:
    """Says where the first mistake in ``data`` is, and what it is; no value of the request, and no word about how it is
    checked."""
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False)[0]
    text = _SAYS.get(first["type"], "has a value that is not allowed").format(**first.get("ctx", {}))
    if first["type"].startswith("custom"):  # by a check of our own
        text = first["msg"]
    if first["type"] == "extra_forbidden" and first["loc"][-1] in LARGE_ENGINE:
        text = "tools and structured output are not served here; vLLM with the llm_accel plug-in has them"
    place = ".".join(_steps(first["loc"], data))
    return BadRequest(f"{place or 'the body'}: {text}.", param=place or None)


def _steps(loc: Sequence[int | str], data: Any) -> list[str]:
    """The way to a value of ``data``, without the alternatives of a type that it was tried for."""
    steps = []
    for number, step in enumerate(loc):
        inside = (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int))
        if inside:
            data = data[step]
        if inside or (isinstance(data, dict) and number == len(loc) - 1):  # or a field that is missing
            text = str(step)
            steps.append(text if len(text) <= _STEP else text[:_STEP] + "...")
    return steps
