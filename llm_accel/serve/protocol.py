"""What requests may contain. What would change the answer and is not supported is refused; other unknown fields are
ignored and reported, or refused too where the operator says so (``--strict-fields``)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from llm_accel.methods.base import INT64
from llm_accel.serve.fields import Body, Name, by_form, text_or_list
from llm_accel.serve.messages import MOST_MESSAGES, Chat, Message

Count = Annotated[int, Field(ge=1, le=INT64)]
Id = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Stop = Annotated[str, Field(min_length=1, max_length=500)]
Items = Field(min_length=1, fail_fast=True)

# What is a large engine's work, and other fields that are not supported: name -> the values that ask for nothing.
LARGE_ENGINE: dict[str, tuple[Any, ...]] = {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_UNSUPPORTED: dict[str, tuple[Any, ...]] = LARGE_ENGINE | {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
}
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # on the answer: other values are treated like unknown fields
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
}


def _max_entries(most: int) -> tuple[BeforeValidator, Any]:
    """Bounds an object before anything in it is looked at, and says so in its schema."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("custom_size", "give at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check), Field(max_length=most)


def _form_of_prompt(value: Any) -> str | None:
    """Which of its alternatives is meant, a list by its first item."""
    first = value[0] if isinstance(value, list) and value else None
    return "id lists" if isinstance(first, list) else "ids" if isinstance(first, int) else text_or_list(value)


class Extension(Body):
    """The field ``llm_accel`` of a request.

    Attributes:
        method: the method for this request, as on the command line; ``dense`` for none.
        session: name of a conversation whose cache is kept; the next request with this name, the same key and a longer
            version of the same conversation goes on with it.
        deadline_s: seconds for this request; the server's own limit holds as well.
    """

    method: Annotated[str, Field(max_length=500)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] | None = None


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False


class ModelRequest(Body):
    """A request for a model, by its name or for the one that is served."""

    model: Annotated[str, Field(max_length=500)] | None = None
    llm_accel: Extension = Extension()


class Request(ModelRequest):
    """What chats and completions share."""

    unsupported, without_effect = _UNSUPPORTED, _WITHOUT_EFFECT

    model: Annotated[str, Field(max_length=500)]
    n: Count = 1
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = None
    min_p: Share = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        *_max_entries(1024),
    ] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Annotated[
        Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=16, fail_fast=True), Tag("list")],
        by_form(text_or_list, "a text or a list of texts"),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Id], Field(max_length=64, fail_fast=True)] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Alternatives | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Name | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Name], *_max_entries(16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unused_tools(cls, data: Any) -> Any:
        """Tools that may not be called are none."""
        unused = {"tools": "tool_choice", "functions": "function_call"}
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if data.get(unused.get(key, "")) != "none"}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, where the request names a number."""
        return self.max_tokens


class ChatRequest(Chat, Request):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Alternatives | None = None
    prompts: ClassVar = (None,)  # one, which the template makes of the messages
    echo: ClassVar = False

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """``POST /v1/completions``; prompts are texts or token ids."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Items, Tag("list")]
        | Annotated[list[Id], Items, Tag("ids")]
        | Annotated[list[Annotated[list[Id], Items]], Items, Tag("id lists")],
        by_form(_form_of_prompt, "a text, a list of token ids, or a list of texts or of such lists"),
    ]
    echo: bool = False
    logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One text or one list of ids for each prompt."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else given


class TokenizeRequest(ModelRequest, Chat):
    """``POST /tokenize``, with a text or a chat."""

    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES, fail_fast=True)] = Field(default_factory=list)
    prompt: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("custom_either", "give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(ModelRequest):
    """``POST /detokenize``."""

    tokens: Annotated[list[Id], Field(fail_fast=True)]
