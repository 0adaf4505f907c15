"""Buffers of compiled decoding that nobody uses at the moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from llm_accel.cache.fixed import FixedForm

IDLE = 2**30  # bytes of unused buffers that are kept for later calls, beside those that came back last
LATEST = 16  # those stay as well if they take no more than IDLE, or one part in so many of the device's memory


class Buffers:
    """The fixed forms of all layers of one cache, each made when its layer needs it: until then the entries of that
    layer are elsewhere, and both at once for all layers would be the cache twice.

    Attributes:
        forms: layer by layer as far as they were made, None for those that hold nothing.
        kind: a number for what is constant in its graphs.
    """

    def __init__(self, kind: int) -> None:
        self.forms: list[FixedForm | None] = []
        self.kind = kind
        self._seen: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """Logical length of the cache, int64 []."""
        assert self._seen is not None
        return self._seen

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for form in self.forms if form is not None for tensor in form.all())

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.seen.device

    def form(self, index: int, build: Callable[[], FixedForm | None]) -> FixedForm | None:
        """The form of one layer, asked for in order: the one that is there, or what ``build`` makes."""
        if index < len(self.forms):
            found = self.forms[index]
            if found is not None:
                found.clear()
            return found
        with torch.inference_mode(False), torch.no_grad():  # they go from calls in one mode to calls in another
            form = build()
            tensors = [] if form is None else form.all()
            if tensors and self._seen is None:
                self._seen = torch.zeros((), dtype=torch.long, device=tensors[0].device)
                tensors.append(self._seen)
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)
        self.forms.append(form)
        return form


class Pool:
    """Buffers go back to the call that needs the same ones, at the same addresses, as CUDA graphs like it. Those that
    have waited longest are let go, and large ones at once: the next prompt may need the memory."""

    def __init__(self) -> None:
        self._idle: list[Buffers] = []
        self._kinds: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> Buffers:
        """Buffers of this kind, for the caller alone: idle ones, or new ones without any form yet."""
        with self._lock:
            kind = self._kinds.setdefault(key, len(self._kinds))
            place = next((index for index, buffers in enumerate(self._idle) if buffers.kind == kind), None)
            return Buffers(kind) if place is None else self._idle.pop(place)

    def put(self, buffers: Buffers) -> None:
        """Takes buffers back."""
        with self._lock:
            older, latest = self._idle, [buffers]
            while sum(one.nbytes for one in older) > IDLE:
                older.pop(0)
            if buffers.nbytes > most_idle(buffers.device):
                latest = []
            self._idle = older + latest


def most_idle(device: torch.device) -> int:
    """Bytes of the latest buffers up to which they stay."""
    if device.type != "cuda":
        return IDLE
    return max(IDLE, torch.cuda.get_device_properties(device).total_memory // LATEST)
