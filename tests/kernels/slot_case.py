"""Problems for slot decode, and their answer in float64: attention head by head, the victim by a loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.slot_decode import slot_decode


@dataclass(frozen=True)
class Case:
    """Slots in random order. Empty ones hold large values that must not be seen; keys are views with gaps."""

    start: tuple[int, ...] | None = None
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    heads: int | None = None
    slots: int = 37
    dim: int = 16
    width: int | None = None
    softcap: float | None = None
    with_sinks: bool = False
    decay: float = 1.0
    keep_first: int = 2
    keep_recent: int = 9
    per_query: bool = False
    ties: bool = False
    dtype: torch.dtype = torch.float32

    def inputs(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """query, key, value, scores, positions, start and sinks."""
        generator = torch.Generator().manual_seed(self.slots)
        heads, query_heads = self.heads or self.kv_heads, self.kv_heads * self.group
        query = torch.randn(self.batch, 1, query_heads, self.dim, generator=generator)
        key = torch.randn(self.batch, self.slots, self.kv_heads, self.dim + 16, generator=generator)
        value = torch.randn(self.batch, self.kv_heads, self.slots, self.width or self.dim, generator=generator)
        scores = torch.rand(self.batch, heads, self.slots, generator=generator)
        positions = torch.rand(self.batch, heads, self.slots, generator=generator).argsort(-1)
        if self.ties:  # no query sees a difference, and scores are few: the oldest of many equals is the victim
            query.zero_()
            scores = (scores * 3).floor()
        start = None if self.start is None else torch.tensor(self.start)
        for row, first in enumerate(self.start or ()):
            key[row, :first], value[row, :, :first] = 1e4, 1e4
            positions[row, :, :first] = -1
        sinks = torch.randn(query_heads, generator=generator).to(self.dtype) if self.with_sinks else None
        parts = {
            "query": query.to(self.dtype).transpose(1, 2),
            "key": key.to(self.dtype).transpose(1, 2)[..., : self.dim],
            "value": value.to(self.dtype),
            "scores": scores,
            "positions": positions,
            "start": start,
            "sinks": sinks,
        }
        return {name: None if part is None else part.to(device) for name, part in parts.items()}

    def ours(self, device: str = "cpu", **changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        options = {name: getattr(self, name) for name in ("decay", "keep_first", "keep_recent", "per_query")}
        given = self.inputs(device) | changes
        return slot_decode(**given, scaling=0.3, softcap=self.softcap, **options)  # type: ignore[arg-type]

    def oracle(self) -> tuple[Tensor, Tensor]:
        """Output and scores, float64."""
        given = self.inputs()
        query, key, value = (given[name].double() for name in ("query", "key", "value"))
        heads = given["scores"].shape[1]
        output = torch.zeros(self.batch, 1, query.shape[1], value.shape[-1], dtype=torch.float64)
        scores = given["scores"].double() * self.decay
        for row in range(self.batch):
            first = 0 if self.start is None else self.start[row]
            for head in range(query.shape[1]):
                logits = key[row, head // self.group, first:] @ query[row, head, 0] * 0.3
                if self.softcap is not None:
                    logits = torch.tanh(logits / self.softcap) * self.softcap
                extra = logits.new_zeros(0) if given["sinks"] is None else given["sinks"][head : head + 1].double()
                weights = torch.cat([logits, extra]).softmax(0)[: len(logits)]
                output[row, 0, head] = weights @ value[row, head // self.group, first:]
                scores[row, head * heads // query.shape[1], first:] += weights
        return output, scores

    def victims(self, scores: Tensor) -> list[list[int]]:
        """By a loop over what may leave, from the scores that were computed."""
        positions, found = self.inputs()["positions"], []
        for row in range(scores.shape[0]):
            found.append([self._victim(scores[row, head], positions[row, head]) for head in range(scores.shape[1])])
        return found

    def _victim(self, scores: Tensor, positions: Tensor) -> int:
        newest = int(positions.max())
        queries = newest - positions + 1 if self.per_query else torch.ones_like(positions)
        ranked = [
            (float(score / seen), position, slot)
            for slot, (score, position, seen) in enumerate(zip(scores, positions.tolist(), queries, strict=True))
            if max(0, self.keep_first) <= position <= newest - self.keep_recent
        ]
        return min(ranked)[2] if ranked else int(positions.argmin())


CASES = {
    "plain": Case(),
    "one_slot": Case(slots=1, keep_first=0, keep_recent=0),
    "one_query_head_per_kv_head": Case(group=1),
    "odd_group": Case(group=3),
    "group_of_sixteen": Case(kv_heads=1, group=16),
    "batch": Case(batch=3),
    "padded": Case(batch=4, start=(0, 5, 36, 18)),
    "row_without_entries": Case(batch=2, start=(37, 3)),
    "padded_sinks": Case(batch=2, start=(37, 3), with_sinks=True),
    "latents": Case(kv_heads=4, group=1, heads=1),
    "narrow_values": Case(width=10),
    "softcap": Case(softcap=1.5),
    "learned_sinks": Case(with_sinks=True),
    "decay": Case(decay=0.7),
    "per_query": Case(per_query=True, keep_first=0),
    "ties": Case(ties=True),
    "ties_padded": Case(ties=True, batch=2, start=(4, 30), keep_first=0),
    "nothing_is_kept": Case(keep_first=0, keep_recent=0),
    "everything_is_kept": Case(keep_first=4, keep_recent=33),
    "float64": Case(dtype=torch.float64),
}
