"""Cache compaction: from a prompt to what is kept of it."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.compaction import gather_entries
from llm_accel.kernels.compaction.reference import gather_entries_reference

HEADS, DIM = 8, 128


def build(slots: int, kept: int, device: str) -> Work:
    with torch.device(device):
        keys, values = torch.randn(2, 1, HEADS, slots, DIM, dtype=torch.bfloat16).unbind(0)
        scores = torch.randn(1, HEADS, slots)
        indices = torch.rand(1, HEADS, slots).topk(kept).indices.sort(-1).values
    return Work(
        run=lambda: gather_entries(indices, keys, values, scores),
        baseline=lambda: gather_entries_reference(indices, keys, values, scores),
    )


def case(slots: int, share: float) -> Case:
    kept = int(slots * share)
    return Case(
        op="gather_entries",
        name=f"{HEADS}/{DIM} S={slots} kept={kept}",
        build=partial(build, slots, kept),
        baseline="torch.gather of each tensor",
        moved=HEADS * kept * (2 * (2 * 2 * DIM + 4) + 8),
    )


CASES = [case(slots, share) for slots in (8192, 32768, 131072) for share in (0.05, 0.125, 0.5, 0.9)]
