"""What a method sees of one layer, made up: random prompts, prompts with given votes, and the laws of every choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from llm_accel.methods import PromptView, ScoreAndKeep


@dataclass(frozen=True)
class Problem:
    """Sizes of a random prompt: rows of ``lengths`` real tokens, padded on the left to the longest one."""

    lengths: tuple[int, ...]
    kv_heads: int
    group: int
    window: int
    budget: int
    protect: bool
    seed: int


@st.composite
def problems(draw: st.DrawFn, protect: bool = True) -> Problem:
    """Any prompt, short or long, and any budget above the window."""
    window = draw(st.integers(1, 9))
    return Problem(
        lengths=tuple(draw(st.lists(st.integers(1, 48), min_size=1, max_size=3))),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4, 8])),
        window=window,
        budget=window + draw(st.integers(1, 24)),
        protect=protect and draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def view_of(problem: Problem, dim: int = 8) -> PromptView:
    """A view with random queries and keys; at most ``budget - window`` old tokens of each row are protected."""
    generator = torch.Generator().manual_seed(problem.seed)
    batch, slots = len(problem.lengths), max(problem.lengths)
    query = torch.randn(batch, problem.kv_heads * problem.group, min(problem.window, slots), dim, generator=generator)
    start = torch.tensor([slots - length for length in problem.lengths])
    protected = None
    if problem.protect:
        protected = torch.zeros(batch, slots, dtype=torch.bool)
        for row in range(batch):
            free = max(0, min(problem.budget - problem.window, problem.lengths[row] - problem.window))
            chosen = torch.randperm(max(0, problem.lengths[row] - problem.window), generator=generator)[:free]
            protected[row, start[row] + chosen[: (free + 1) // 2]] = True
    return PromptView(
        query=query,
        key=torch.randn(batch, problem.kv_heads, slots, dim, generator=generator),
        kv_heads=problem.kv_heads,
        start=start if bool(start.any()) else None,
        scaling=0.5,
        softcap=None,
        sinks=None,
        layer=1,
        layers=3,
        protected=protected,
    )


def row_of(view: PromptView, row: int) -> PromptView:
    """One row of a view alone, without its padding."""
    first = 0 if view.start is None else int(view.start[row])
    return replace(
        view,
        query=view.query[row : row + 1, :, -(view.slots - first) :],
        key=view.key[row : row + 1, :, first:],
        start=None,
        protected=None if view.protected is None else view.protected[row : row + 1, first:],
    )


def view_with_votes(votes: list[float], window: int) -> PromptView:
    """One row and head whose ``window`` queries together give the entries before the window exactly these votes:
    the keys are unit vectors, so that a query is the list of its own logits."""
    prefix = torch.tensor(votes) / window
    assert float(prefix.sum()) < 1.0
    slots = len(votes) + window
    query = torch.full((1, 1, window, slots), -1e4)
    for index in range(window):
        rest = (1.0 - float(prefix.sum())) / (index + 1)
        query[0, 0, index, : len(votes)] = prefix.clamp(min=1e-30).log()
        query[0, 0, index, len(votes) : len(votes) + index + 1] = torch.tensor(rest).log()
    key = torch.eye(slots)[None, None]
    return PromptView(query, key, kv_heads=1, start=None, scaling=1.0, softcap=None, sinks=None, layer=0, layers=1)


def choose(config: ScoreAndKeep, view: PromptView) -> Tensor:
    """What a method keeps; it is asked only when there is something to evict, otherwise everything stays."""
    if config.entries(view.slots) < view.slots:
        return config.select(view)
    kept = torch.arange(view.slots).expand(view.key.shape[0], view.kv_heads, -1)
    return kept if view.start is None else kept.masked_fill(kept < view.start[:, None, None], -1)


def kept_sets(kept: Tensor) -> list[list[set[int]]]:
    """Kept slots per row and head as sets, without the -1."""
    return [[{slot for slot in head if slot >= 0} for head in row] for row in kept.tolist()]


def check_laws(config: ScoreAndKeep, view: PromptView, always: int) -> Tensor:
    """Everything that holds for every choice of every method; the last ``always`` entries are always kept."""
    kept = choose(config, view)
    batch, slots = view.key.shape[0], view.slots
    starts = [0] * batch if view.start is None else view.start.tolist()
    assert kept.dtype == torch.int64
    assert kept.shape == (batch, view.kv_heads, config.entries(slots))
    for row, first in enumerate(starts):
        count = config.entries(slots - first)
        for head in kept[row].tolist():
            real = head[len(head) - count :]
            assert head[: len(head) - count] == [-1] * (len(head) - count)
            assert all(one < other for one, other in pairwise(real))
            assert all(first <= slot < slots for slot in real)
            assert set(range(max(first, slots - always), slots)) <= set(real)
            if view.protected is not None:
                assert set(view.protected[row].nonzero()[:, 0].tolist()) <= set(real)
    assert torch.equal(choose(config, view), kept)
    return kept
