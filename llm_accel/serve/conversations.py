"""Caches of conversations, kept between requests: bounded in number and bytes, the one unused longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from llm_accel.methods import MethodConfig

Key = tuple[str, str]  # API key, name that the client gave


@dataclass
class Conversation:
    """A filled cache of one row.

    Attributes:
        ids: the tokens that it has seen.
        cache: their keys and values, compressed by ``methods``.
        methods: none for dense.
        nbytes: bytes that it holds, linear-attention states included.
    """

    ids: tuple[int, ...]
    cache: Any
    methods: tuple[MethodConfig, ...]
    nbytes: int


class Conversations:
    """Least recently used first; used by the inference thread alone."""

    def __init__(self, limit: int, byte_limit: float) -> None:
        self._limit, self._byte_limit = limit, byte_limit
        self._kept: OrderedDict[Key, Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept caches."""
        return sum(conversation.nbytes for conversation in list(self._kept.values()))

    def take(self, key: Key, prompt: tuple[int, ...], methods: tuple[MethodConfig, ...]) -> Conversation | None:
        """Takes the conversation out while it is used. None if there is none that ``prompt`` continues: a compressed
        cache cannot go back, so the prompt must begin with all that it has seen."""
        found = self._kept.pop(key, None)
        if found is None or methods != found.methods or len(prompt) <= len(found.ids):
            return None
        return found if prompt[: len(found.ids)] == found.ids else None

    def keep(self, key: Key, conversation: Conversation) -> None:
        """Puts it back, and drops others until the bounds hold; one that passes them alone is not kept."""
        self._kept[key] = conversation
        while self._kept and (len(self._kept) > self._limit or self.nbytes > self._byte_limit):
            self._kept.popitem(last=False)
