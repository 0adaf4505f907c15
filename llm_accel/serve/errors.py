"""Errors as the API answers them: a status, and the JSON that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

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
OUTCOMES = ("ok", *STATUS)


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        outcome: which of :data:`STATUS` it is; also its label in the metrics.
        message: one sentence for the client.
        headers: further headers of the response.
    """

    def __init__(self, outcome: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.outcome, self.message, self.headers = outcome, message, headers or {}

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.outcome]

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.outcome}}
