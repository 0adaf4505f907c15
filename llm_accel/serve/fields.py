"""What the fields of requests have in common: their types, bounds, and what becomes of those that are not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

_MOST_FIELDS, _LONGEST_NAME = 64, 100  # of an object

Name = Annotated[str, Field(max_length=512)]


def text_or_list(value: Any) -> str | None:
    """Which alternative of a field is meant."""
    return "list" if isinstance(value, list) else "text" if isinstance(value, str) else None


def by_form(which: Callable[[Any], str | None], allowed: str) -> Discriminator:
    """Each value is tried for the one alternative that it means, so that there is one complaint."""
    return Discriminator(which, custom_error_type="custom_form", custom_error_message=f"give {allowed}")


def _same(value: Any, other: Any) -> bool:
    """As JSON sees it: to Python, false is 0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _add_neutral(schema: dict[str, Any], kind: type[Body]) -> None:
    """Adds the values that ask for nothing to a JSON schema."""
    required, properties = schema.get("required", ()), schema["properties"]
    for name, one in properties.items():
        if name not in required and {"type": "null"} not in one.get("anyOf", ()):
            properties[name] = {"anyOf": [one, {"type": "null"}]}
    neutral = kind.unsupported | kind.without_effect
    properties |= {name: {"enum": [None, *values]} for name, values in neutral.items()}


class Body(BaseModel):
    """An object of a request.

    Attributes:
        unsupported: name of a field -> its values that ask for nothing; any other value is refused.
        without_effect: the same for fields that leave the answer as it is; any other value makes them unknown fields.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_add_neutral)

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any, info: ValidationInfo) -> Any:
        """Null is the same as not given, and so is a value that asks for nothing. Where the context has a set for them,
        names of unknown fields go there."""
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise PydanticCustomError("custom_size", "give at most {most} fields", {"most": _MOST_FIELDS})
        neutral = cls.without_effect | cls.unsupported
        data = {
            key: value
            for key, value in data.items()
            if value is not None and not any(_same(value, nothing) for nothing in neutral.get(key, ()))
        }
        ignored = (info.context or {}).get("ignored")
        if ignored is not None:
            known = cls.model_fields.keys() | cls.unsupported.keys()
            unknown = {key for key in data.keys() - known if len(key) <= _LONGEST_NAME}
            ignored |= unknown
            data = {key: value for key, value in data.items() if key not in unknown}
        return data
