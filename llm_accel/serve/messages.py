"""Messages of a chat, and how the model's template puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import from_json

from llm_accel.serve.fields import Body, Name, by_form, text_or_list

MOST_MESSAGES, MOST_PARTS_OF_A_MESSAGE, _MOST_CALLS = 4096, 1024, 128


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where an image is: inside the URL itself. The model's processor decides how much detail it sees."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Function(Body):
    """A function that was called, and its arguments as JSON."""

    name: Name
    arguments: str = "{}"


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: Name = ""
    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as an object where they are one."""
        try:
            arguments = from_json(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class Message(Body):
    """One turn of a chat."""

    unsupported: ClassVar = {"annotations": ([],), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=MOST_PARTS_OF_A_MESSAGE, fail_fast=True),
            Tag("list"),
        ],
        by_form(text_or_list, "a text or a list of parts"),
    ]
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=_MOST_CALLS, fail_fast=True)] = Field(default_factory=list)
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, data: Any) -> Any:
        """An answer that only called tools has no content."""
        empty = isinstance(data, dict) and data.get("role") == "assistant" and data.get("content") is None
        return data | {"content": ""} if empty else data

    @property
    def parts(self) -> Sequence[TextPart | ImagePart]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.parts if isinstance(part, ImagePart)]

    @property
    def characters(self) -> int:
        """Length of its texts, arguments of calls included."""
        texts = sum(len(part.text) for part in self.parts if isinstance(part, TextPart))
        return texts + sum(len(call.function.arguments) for call in self.tool_calls)

    def plain(self) -> dict[str, Any]:
        """As the chat templates of text models take it."""
        return self._turn("\n".join(part.text for part in self.parts if isinstance(part, TextPart)))

    def mixed(self) -> dict[str, Any]:
        """As the chat templates of vision-language models take it."""
        return self._turn(
            [{"type": "image"} if isinstance(part, ImagePart) else part.model_dump() for part in self.parts]
        )

    def _turn(self, content: Any) -> dict[str, Any]:
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        calls = [call.plain() for call in self.tool_calls]
        more = {"name": self.name, "tool_calls": calls or None, "tool_call_id": self.tool_call_id}
        return turn | {key: value for key, value in more.items() if value is not None}


class Chat(Body):
    """Messages, and how the model's template puts them together."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    chat_template_kwargs: dict[Annotated[str, Field(max_length=64)], Any] = Field(default_factory=dict)
