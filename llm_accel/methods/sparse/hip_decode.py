"""What HiP remembers between decode steps: which chunks each stage kept, and when it last chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.hip_select import Keys, Search, StageSearch, listed


@dataclass(frozen=True)
class DecodeMemory:
    """One layer after a decode step.

    Attributes:
        slots: stored slots at that step.
        step: decode steps since the beginning.
        kept: chunks that each stage kept, int64 [B, H, 1, n]; empty while attention was dense.
        seen: stored slots when each stage last ran.
        lists: what attention sees until the next choice, where it has been put together.
    """

    slots: int
    step: int = 0
    kept: tuple[Tensor, ...] = ()
    seen: tuple[int, ...] = ()
    lists: BlockList | None = None

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


def due_stage(refresh: Sequence[int], step: int, dense: bool, chosen: bool) -> tuple[bool, int | None]:
    """Whether a decode step attends to chosen blocks, and the first stage that selects again for it, None if none does.

    Stage ``i`` chooses every ``refresh[i]`` steps and every later stage with it. The first choice after dense steps
    runs all stages; until it is due, everything is seen.

    Args:
        refresh: steps between two choices of each stage, each dividing the one before.
        step: decode steps before this one.
        dense: whether the budget covers the whole context.
        chosen: whether a choice has been made before.
    """
    due = next((stage for stage, period in enumerate(refresh) if step % period == 0), None)
    if dense or (due is None and not chosen):
        return False, None
    return True, due if chosen else 0


def choose(
    search: Search,
    query: Tensor,
    keys: Keys,
    end: Tensor,
    most: int,
    due: int,
    kept: Sequence[Tensor],
    then: Tensor | None,
    moved: int,
) -> list[Tensor]:
    """The chunks that stage ``due`` and each later one keep for one query per row, int64 [B, H, 1, n]; of a search
    without stages the chosen blocks.

    Args:
        query: [B, Hq, 1, D].
        end: where the candidates end, int64 [B or 1, 1, 1, 1].
        most: candidate keys of the longest row, or more.
        kept: what each earlier stage kept.
        then: where the candidates ended when the stage before chose, as ``end``; None if there is none.
        moved: tokens since then, or more.
    """
    if not isinstance(search, StageSearch):
        return [search.select_one(query, keys, end, most)]
    return search.refine(query, keys, end, most, due, kept, then, moved)


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

    A stage starts from what the stage before kept and from the chunks that left the window since. Between two choices
    the window only grows, so that no entry is out of sight because it left the window.

    Args:
        query: [B, Hq, 1, D].
        key: [B, H, S, D].
        start: first real slot of each row, int64 [B], or None.
        search: how blocks are found.
        refresh: steps between two choices of each stage; see :func:`due_stage`.
        dense: whether the budget covers the whole context.
        memory: after the step before. What belongs to other slots is forgotten: the cache was rolled back, cut, or
            filled by a call of several tokens.
    """
    slots = key.shape[2]
    if memory is None or memory.slots != slots - 1:
        memory = DecodeMemory(slots - 1, step=-1)
    step, kept, seen = memory.step + 1, memory.kept, memory.seen
    sparse, due = due_stage(refresh, step, dense, bool(kept))
    if not sparse:
        return None, DecodeMemory(slots, step)
    if due is None and memory.lists is not None:  # between two choices only the window grows, to its open end
        return memory.lists, DecodeMemory(slots, step, kept, seen, memory.lists)
    scope = search.scope
    if due is not None:
        keys, most = Keys.of(key, start), scope.most(1, slots, 0)
        then, moved = (scope.end_of(seen[due - 1], start, query.device), slots - seen[due - 1]) if due else (None, 0)
        end = scope.end_of(slots, start, query.device)
        found = choose(search, query, keys, end, most, due, kept, then, moved)
        kept, seen = (*kept[:due], *found), (*seen[:due], *[slots] * len(found))
    lists = listed(kept[-1], scope, scope.end_of(seen[-1], start, query.device)[:, 0, 0])
    return lists, DecodeMemory(slots, step, kept, seen, lists)
