"""Buffers of compiled decoding that nobody uses at the moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from llm_accel.cache.fixed import FixedForm

IDLE = 2**30  # bytes of unused buffers that are kept for later calls, beside those that came back last


class Buffers:
    """The fixed forms of all layers of one cache.

    Attributes:
        forms: layer by layer, None for those that hold nothing.
        seen: logical length of the cache, int64 [].
        kind: a number for what is constant in its graphs.
    """

    def __init__(self, forms: Sequence[FixedForm | None], kind: int) -> None:
        self.forms, self.kind = tuple(forms), kind
        tensors = [tensor for form in forms if form is not None for tensor in form.all()]
        with torch.inference_mode(False):
            self.seen = torch.zeros((), dtype=torch.long, device=tensors[0].device)
        for tensor in (self.seen, *tensors):
            torch._dynamo.mark_static_address(tensor, guard=False)
        self.nbytes = sum(tensor.nbytes for tensor in tensors)


class Pool:
    """Buffers go back to the call that needs the same ones, at the same addresses, as CUDA graphs like it. Those that
    have waited longest are let go."""

    def __init__(self) -> None:
        self._idle: list[Buffers] = []
        self._kinds: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def take(self, key: Hashable, build: Callable[[], Sequence[FixedForm | None]]) -> Buffers:
        """Buffers of this kind, for the caller alone: idle ones, or what ``build`` makes."""
        with self._lock:
            kind = self._kinds.setdefault(key, len(self._kinds))
            place = next((index for index, buffers in enumerate(self._idle) if buffers.kind == kind), None)
            found = None if place is None else self._idle.pop(place)
        if found is None:
            return Buffers(build(), kind)
        for form in found.forms:
            if form is not None:
                form.clear()
        return found

    def put(self, buffers: Buffers) -> None:
        """Takes buffers back."""
        with self._lock:
            self._idle.append(buffers)
            older = self._idle[:-1]
            while sum(one.nbytes for one in older) > IDLE:
                older.pop(0)
            self._idle[:-1] = older
