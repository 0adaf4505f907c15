"""What requests may say. Anything that would change the answer and is not supported is refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

# Fields of OpenAI's API that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}


def _encodable(text: str) -> str:
    text.encode()  # JSON may carry half of a surrogate pair, which is no character
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Id = Annotated[int, Field(ge=0)]


def _same(value: Any, other: Any) -> bool:
    """As JSON sees it: to Python, false is 0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _tell(neutral: dict[str, tuple[Any, ...]]) -> Callable[[dict[str, Any]], None]:
    """Adds to a JSON schema what :func:`_without_neutral` takes."""

    def add(schema: dict[str, Any]) -> None:
        required, properties = schema.get("required", ()), schema["properties"]
        for name, one in properties.items():
            if name not in required and {"type": "null"} not in one.get("anyOf", ()):
                properties[name] = {"anyOf": [one, {"type": "null"}]}
        properties |= {name: {"enum": [None, *values]} for name, values in neutral.items()}

    return add


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _without_neutral(data: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """Null is the same as not given, and so is a value that asks for nothing."""
    if not isinstance(data, dict):
        return data
    return {
        key: value
        for key, value in data.items()
        if value is not None and not any(_same(value, nothing) for nothing in neutral.get(key, ()))
    }


class Extension(_Body):
    """The field ``llm_accel`` of a request.

    Attributes:
        method: the method for this request, as on the command line; ``dense`` for none.
        session: name of a conversation whose cache is kept; the next request with this name, the same key and a longer
            version of the same conversation goes on with it.
        deadline_s: seconds for this request; the server's own limit holds as well.
    """

    method: Annotated[Text, Field(max_length=500)] | None = None
    session: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None


class StreamOptions(_Body):
    """How a stream ends."""

    include_usage: bool = False


class Request(_Body):
    """What both endpoints share."""

    model_config = ConfigDict(json_schema_extra=_tell(_NEUTRAL))

    model: Text
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: (
        Annotated[Text, Field(min_length=1, max_length=500)]
        | Annotated[list[Annotated[Text, Field(min_length=1, max_length=500)]], Field(max_length=16)]
    ) = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Text | None = None
    metadata: dict[str, Text] | None = None
    llm_accel: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without_neutral(data, _NEUTRAL)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    """Where an image is: inside the URL itself."""

    url: Text
    detail: Literal["auto"] = "auto"


class ImagePart(_Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Body):
    """One turn of a chat."""

    model_config = ConfigDict(json_schema_extra=_tell(_NEUTRAL_IN_MESSAGES))

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return _without_neutral(data, _NEUTRAL_IN_MESSAGES)

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.parts if isinstance(part, ImagePart)]

    def plain(self) -> dict[str, Any]:
        """As the chat templates of text models take it."""
        return self._turn("\n".join(part.text for part in self.parts if isinstance(part, TextPart)))

    def mixed(self) -> dict[str, Any]:
        """As the chat templates of vision-language models take it."""
        return self._turn(
            [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in self.parts]
        )

    def _turn(self, content: Any) -> dict[str, Any]:
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **named}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """``POST /v1/completions``; prompts are texts or token ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One text or one list of ids for each prompt."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else given


def parse_body(kind: type[Request], body: bytes) -> Any:
    """A checked request; pydantic's :class:`ValidationError` otherwise."""
    return kind.model_validate_json(body)


def complaint(error: ValidationError) -> str:
    """What is wrong, where, in one line; nothing of the request's text."""
    parts = []
    for one in error.errors(include_url=False, include_context=False, include_input=False)[:3]:
        place = ".".join(str(step) for step in one["loc"])
        text = "unknown, or not supported with this value" if one["type"] == "extra_forbidden" else one["msg"]
        parts.append(f"{place}: {text}" if place else text)
    return "; ".join(parts)
