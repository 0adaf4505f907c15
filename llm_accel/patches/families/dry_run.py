"""What a vision-language model hands to its decoder, seen by a call that ends there: no layer of it runs, nor does the
vision tower, and the model is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = 7  # of a row; no other size of a model is likely to be that
_ROWS = 3  # of them the image's
_BATCH = 2


@dataclass(frozen=True)
class DryRun:
    """What was seen.

    Attributes:
        arguments: those of the decoder, by name; None where the call ended before.
        embeds: whether features take the places of placeholders, one after the other; None where none were asked for.
        reads: attributes of what ``get_image_features`` returns that were looked at.
    """

    arguments: dict[str, Any] | None
    embeds: bool | None = None
    reads: frozenset[str] = frozenset()


class _Reached(BaseException):
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class _Features:
    """Stands for what ``get_image_features`` returns; notes what is read of it."""

    def __init__(self, features: Any, deeper: Any) -> None:
        self.read: set[str] = set()
        self._known = {"pooler_output": features, "deepstack_features": [deeper]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.read.add(name)
        if name not in self._known:
            raise AttributeError(name)
        return self._known[name]


def dry_run(model: Any, image_token: int | None = None) -> DryRun:
    """Calls the model with two short prompts, the first padded.

    Args:
        model: a vision-language model.
        image_token: the placeholder of its images, to see what becomes of features; None: text alone.
    """
    device = next((part.device for part in model.parameters() if part.device.type != "meta"), torch.device("cpu"))
    ids = torch.ones(_BATCH, TOKENS, dtype=torch.long, device=device)
    mask = ids.clone()
    mask[0, 0] = 0
    kinds = torch.zeros_like(ids)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    parameters = inspect.signature(type(model.base_model).forward).parameters
    given |= {name: kinds for name in parameters if name.endswith("token_type_ids")}
    if image_token is None:
        return DryRun(_arguments(model, given))
    image = slice(2, 2 + _ROWS)
    ids[:, image], kinds[:, image] = image_token, 1
    width = model.get_input_embeddings().weight.shape[1]
    rows = torch.arange(1.0, 1 + _BATCH * _ROWS, device=device)[:, None].expand(-1, width)
    read: frozenset[str] = frozenset()
    stacked = rows.view(_BATCH, _ROWS, -1)
    for features, deeper in ((rows,), rows), (stacked, rows), ((rows,), (rows,)):  # forms that models know
        output = _Features(features, deeper)
        arguments = _arguments(model, given | {"pixel_values": rows.new_zeros(1, 3, 4, 4)}, output)
        read |= output.read
        if arguments is not None:
            found = arguments["inputs_embeds"][:, image].flatten(0, 1)
            placed = found.shape == rows.shape and bool((found.to(device) == rows).all())
            return DryRun(arguments, placed if read else None, read)
    return DryRun(None, None, read)


def _arguments(model: Any, given: dict[str, Any], features: _Features | None = None) -> dict[str, Any] | None:
    """Arguments of the decoder by name; None where the call fails before."""
    decoder, holder = model.get_decoder(), model.base_model

    def reached(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        raise _Reached(kwargs | dict(zip(names, args, strict=False)))

    hook = decoder.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), _left_alone(holder):
            if features is not None:
                holder.get_image_features = lambda *args, **kwargs: features
            holder(**given)
    except _Reached as seen:
        return seen.arguments
    except Exception:  # models may raise anything for a call as bare as this one
        return None
    finally:
        hook.remove()
    return None


@contextmanager
def _left_alone(holder: Any) -> Iterator[None]:
    """Attributes of the model are inside and afterwards the same objects: some remember what the latest prompt was."""
    before = dict(vars(holder))
    try:
        yield
    finally:
        now = vars(holder)
        for name in [name for name in now if name not in before]:
            del now[name]
        now.update(before)


def per_token(arguments: dict[str, Any]) -> list[str]:
    """Names of those arguments that have an entry per token, or per visual token, of the calls above."""
    return [name for name, value in arguments.items() if _has(value, (TOKENS, _BATCH * TOKENS, _BATCH * _ROWS))]


def _has(value: Any, sizes: tuple[int, ...]) -> bool:
    if isinstance(value, Tensor):
        return any(size in value.shape for size in sizes)
    if isinstance(value, dict):
        return any(_has(one, sizes) for one in value.values())
    return isinstance(value, list | tuple) and any(_has(one, sizes) for one in value)
