"""Errors as the API answers them: a status, and the JSON that OpenAI's clients read."""

from __future__ import annotations

import re
from typing import Any

_MOST = 600  # characters of a message
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "body_timeout": 408,
    "too_large": 413,
    "queue_full": 429,
    "client_left": 499,
    "error": 500,
    "shutting_down": 503,
    "deadline": 504,
}


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        outcome: which of :data:`STATUS` it is; also its label in the metrics.
        message: one sentence for the client, cut where it quotes too much; no addresses of objects.
        headers: further headers of the response.
        code: what programs read; the outcome where OpenAI has no code of its own.
        param: the field of the request that is wrong, where it is one.
    """

    def __init__(
        self,
        outcome: str,
        message: str,
        headers: dict[str, str] | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        plain = _ADDRESS.sub("", message)
        self.message = plain if len(plain) <= _MOST else plain[:_MOST] + "..."
        super().__init__(self.message)
        self.outcome, self.headers, self.code, self.param = outcome, headers or {}, code or outcome, param

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.outcome]

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "rate_limit_error" if self.status == 429 else "server_error"
        kind = kind if self.status >= 429 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class BadRequest(ApiError):
    """A request that cannot be answered as it is: status 400."""

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__("bad_request", message, code=code, param=param)


class ContextExceeded(BadRequest):
    """A prompt, or a prompt and its answer, of more tokens than fit."""

    def __init__(self, given: str, context: int) -> None:
        # clients that fall back to another model look for this code, or for these words
        text = f"{given}. This model's maximum context length is {context} tokens."
        super().__init__(text, "context_length_exceeded")


def shutting_down() -> ApiError:
    """What requests get that a stopping server does not finish."""
    return ApiError("shutting_down", "the server is shutting down; try another one or come back later.")
