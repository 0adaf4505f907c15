"""What HiP remembers between decode steps: which chunks each stage kept, and when it last chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.hip_select import Search, StageSearch, listed


@dataclass(frozen=True)
class DecodeMemory:
    """One layer after a decode step.

    Attributes:
        slots: stored slots at that step.
        step: decode steps since the beginning.
        kept: chunks that each stage kept, int64 [B, H, 1, n]; empty while attention was dense.
        seen: stored slots when each stage last ran.
    """

    slots: int
    step: int = 0
    kept: tuple[Tensor, ...] = ()
    seen: tuple[int, ...] = ()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> DecodeMemory:
        """The memory after the rows of the batch were reordered, repeated or selected."""
        return DecodeMemory(self.slots, self.step, tuple(map(change, self.kept)), self.seen)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers to be stored with the cache."""
        tensors = {f"kept_{stage}": kept for stage, kept in enumerate(self.kept)}
        seen = {f"seen_{stage}": slots for stage, slots in enumerate(self.seen)}
        return tensors, {"slots": self.slots, "step": self.step} | seen

    @classmethod
    def of(cls, tensors: dict[str, Tensor], values: dict[str, int]) -> DecodeMemory:
        """What :meth:`state` wrote."""
        stages = range(len(tensors))
        kept, seen = (tensors[f"kept_{stage}"] for stage in stages), (values[f"seen_{stage}"] for stage in stages)
        return cls(values["slots"], values["step"], tuple(kept), tuple(seen))


def decode_step(
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    search: Search,
    refresh: tuple[int, ...],
    dense: bool,
    memory: DecodeMemory | None,
) -> tuple[BlockList | None, DecodeMemory]:
    """The blocks that one decode step sees, None for all of them, and the memory for the next step.

    Stage ``i`` chooses anew every ``refresh[i]`` steps and every later stage with it; it starts from what the stage
    before kept and from the chunks that left the window since. Between two choices the window only grows, so that no
    entry is out of sight because it left the window.

    Args:
        query: [B, Hq, 1, D].
        key: [B, H, S, D].
        start: first real slot of each row, int64 [B], or None.
        search: how blocks are found.
        refresh: steps between two choices of each stage, each dividing the one before.
        dense: whether the budget covers the whole context.
        memory: after the step before. What belongs to other slots is forgotten: the cache was rolled back, cut, or
            filled by a call of several tokens.
    """
    slots = key.shape[2]
    if memory is None or memory.slots != slots - 1:
        memory = DecodeMemory(slots - 1, step=-1)
    step = memory.step + 1
    due = next((stage for stage, period in enumerate(refresh) if step % period == 0), None)
    kept, seen = memory.kept, memory.seen
    if dense or (due is None and not kept):  # everything was seen at the last choice, and the window has grown since
        return None, DecodeMemory(slots, step)
    if due is not None and isinstance(search, StageSearch):
        if not kept:
            kept, seen = search.unpruned(key, start, due), (slots,) * due
        found = search.refine(query, key, start, due, kept[:due], seen[:due])
        kept, seen = (*kept[:due], *found), (*seen[:due], *[slots] * len(found))
    elif due is not None:
        kept, seen = (search.select(query, key, start),), (slots,)
    begin = search.scope.window_start(1, seen[-1], start, query.device)
    return listed(kept[-1], search.scope, begin), DecodeMemory(slots, step, kept, seen)
