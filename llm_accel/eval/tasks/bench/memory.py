"""Peak memory while a prompt is read and while tokens are decoded."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that operations make while it is active, on any device. What one
    operation uses inside, and gives back before it ends, is not seen. Slow: never around anything that is timed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it has made."""
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._held:
            return
        self._held.add(storage)
        count = storage.nbytes()
        self.live += count
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, count)

    def _drop(self, count: int) -> None:
        self.live -= count


class PeakMemory:
    """The highest memory of one call, in two parts that :meth:`lap` divides; weights are part of both.

    Attributes:
        source: where the figures come from, in words.
    """

    def __init__(self, device: torch.device, weight_bytes: int) -> None:
        self.device, self.weight_bytes = device, weight_bytes
        self._tracker = None if device.type == "cuda" else TensorBytes()
        self._laps: list[int] = []

    @property
    def source(self) -> str:
        """Where the figures come from."""
        if self._tracker is None:
            return "CUDA allocator, peak of allocated bytes"
        return "tensor storages made by operations, plus weights; scratch space inside one operation is not seen"

    def __enter__(self) -> PeakMemory:
        if self._tracker is None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._tracker.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        self.lap()
        if self._tracker is not None:
            self._tracker.__exit__(*failure)  # type: ignore[no-untyped-call]

    def lap(self) -> None:
        """Closes one part and begins the next."""
        if self._tracker is None:
            self._laps.append(torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._laps.append(self.weight_bytes + self._tracker.peak)
            self._tracker.peak = self._tracker.live

    @property
    def prefill(self) -> int:
        """Peak up to the first token, bytes."""
        return self._laps[0]

    @property
    def decode(self) -> int:
        """Peak after it, bytes."""
        return max(self._laps[1:], default=0)


def largest_batch(limit: int, weight_bytes: int, prefill_peak: int | None, kv_bytes: int, batch: int) -> dict[str, Any]:
    """How many rows fit, computed from the figures of one cell, whose rows are assumed to cost the same each.

    Returns:
        ``at_once``: rows whose prompts are read in one call, None where no peak is known; ``one_by_one``: rows decoded
        together after their prompts were read one after the other; ``kv_only``: rows whose cache fits.
    """
    free, held = limit - weight_bytes, kv_bytes / batch
    if free <= 0:
        return {"at_once": 0, "one_by_one": 0, "kv_only": 0}
    rows: dict[str, Any] = {"at_once": None, "one_by_one": None, "kv_only": int(free // held)}
    if prefill_peak is not None:
        reading = max((prefill_peak - weight_bytes) / batch, held)
        rows["at_once"] = int(free // reading)
        rows["one_by_one"] = 0 if reading > free else 1 + int((free - reading) // held)
    return rows
