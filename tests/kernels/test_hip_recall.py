"""How much of the attention the searches find, on seeded synthetic data: a change that costs quality shows here.

Two settings. Keys with a correlation length, and queries that point at one earlier key for 8 rows at a time; and one
query after 32768 keys, with a few keys planted that stand out by six standard deviations.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from llm_accel.kernels.hip_select import ABSENT, ExactSearch, Scope, Search, Stage, StageSearch, TreeSearch

LENGTH, DIM, BUDGET, BLOCK_Q = 8192, 64, 512, 64
MEASURED = range(64, 128, 4)  # query blocks of the second half
CLOSE = 0.03


def scope(block_k: int) -> Scope:
    return Scope(sink=64, window=256, block_q=BLOCK_Q, block_k=block_k)


SEARCHES: dict[str, Search] = {
    "stages": StageSearch(scope(8), BUDGET, (Stage(256, None, 4), Stage(32, 4096, 4), Stage(8, 2048, 1)), False),
    "stages_exact_last": StageSearch(scope(8), BUDGET, (Stage(256, None, 4), Stage(32, 4096, 4), Stage(8, 2048, 1))),
    "fine_stages": StageSearch(scope(8), BUDGET, (Stage(64, None, 4), Stage(32, 4096, 4), Stage(8, 2048, 1)), False),
    "tree_2": TreeSearch(scope(2), BUDGET),
    "tree_8": TreeSearch(scope(8), BUDGET),
    "exact": ExactSearch(scope(8), BUDGET),
}


@cache
def peaked(correlation: int) -> tuple[Tensor, Tensor]:
    """Queries [1, 2, T, D] and keys [1, 1, T, D]; ``correlation``: tokens after which keys have changed."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(LENGTH, DIM, generator=generator)
    key = noise.clone()
    if correlation:
        decay = math.exp(-1 / correlation)
        for position in range(1, LENGTH):
            key[position] = decay * key[position - 1] + math.sqrt(1 - decay**2) * noise[position]
    first = torch.arange(0, LENGTH, 8)
    query = torch.randn(2, LENGTH, DIM, generator=generator)
    target = (torch.rand(2, len(first), generator=generator) * first.clamp(min=1)).long().repeat_interleave(8, 1)
    return (query + 4 * key[target])[None], key[None, None]


def found(search: Search, query: Tensor, key: Tensor) -> tuple[float, float]:
    """Share of the attention between sink and window, and share of its best 512 tokens, that the choice holds."""
    starts = search.select(query, key, None)[0, 0]
    ends = search.scope.window_start(LENGTH, LENGTH, None, key.device)[0]
    slots, held, mass, recall = torch.arange(LENGTH), 0.0, 0.0, []
    for block in MEASURED:
        rows = torch.arange(block * BLOCK_Q, (block + 1) * BLOCK_Q)
        logits = query[0, :, rows] @ key[0, 0].T / math.sqrt(DIM)
        logits = logits.masked_fill(slots > rows[:, None], float("-inf"))
        probability = logits.softmax(-1).sum((0, 1))
        chosen = torch.zeros(LENGTH, dtype=torch.bool)
        begin = starts[block][starts[block] < ABSENT]
        chosen[(begin[:, None] + torch.arange(search.scope.block_k)).flatten()] = True
        far = slice(search.scope.sink, int(ends[block]))
        held, mass = held + float(probability[chosen].sum()), mass + float(probability[far].sum())
        best = logits.amax((0, 1))[far].topk(BUDGET).indices + far.start
        recall.append(chosen[best].float().mean())
    return held / mass, float(torch.stack(recall).mean())


# correlation length, search -> share of the attention, share of the best tokens
EXPECTED: dict[tuple[int, str], tuple[float, float]] = {
    (0, "stages"): (0.337, 0.207),
    (0, "stages_exact_last"): (0.506, 0.207),
    (0, "fine_stages"): (0.329, 0.208),
    (0, "tree_2"): (0.362, 0.342),
    (0, "tree_8"): (0.395, 0.195),
    (0, "exact"): (1.000, 0.205),
    (4, "stages"): (0.778, 0.424),
    (4, "stages_exact_last"): (0.778, 0.426),
    (4, "fine_stages"): (0.917, 0.463),
    (4, "tree_2"): (0.951, 0.628),
    (4, "tree_8"): (0.642, 0.373),
    (4, "exact"): (0.999, 0.483),
    (16, "stages"): (0.897, 0.798),
    (16, "stages_exact_last"): (0.897, 0.800),
    (16, "fine_stages"): (0.996, 0.837),
    (16, "tree_2"): (1.000, 0.927),
    (16, "tree_8"): (0.949, 0.798),
    (16, "exact"): (1.000, 0.839),
    (64, "stages"): (0.871, 0.918),
    (64, "stages_exact_last"): (0.871, 0.920),
    (64, "fine_stages"): (0.872, 0.921),
    (64, "tree_2"): (0.895, 0.967),
    (64, "tree_8"): (0.868, 0.921),
    (64, "exact"): (0.872, 0.922),
}


@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "name"), EXPECTED)
def test_the_share_of_attention_that_is_found(correlation: int, name: str) -> None:
    mass, recall = found(SEARCHES[name], *peaked(correlation))
    assert (mass, recall) == pytest.approx(EXPECTED[correlation, name], abs=CLOSE)


# --- planted keys ----------------------------------------------------------------------------------------------------

PLANTED_SCOPE = Scope(sink=256, window=1024, block_q=16, block_k=8)
COARSE = (Stage(256, None, 1), Stage(32, 32768, 1), Stage(8, 8192, 1))
PLANTED: dict[str, Search] = {
    "bisected": StageSearch(PLANTED_SCOPE, 2048, COARSE, last_exact=False),
    "default": StageSearch(PLANTED_SCOPE, 2048, COARSE),
    "tree": TreeSearch(PLANTED_SCOPE, 2048),
    "exact": ExactSearch(PLANTED_SCOPE, 2048),
}
TRIALS, CONTEXT = 96, 32768


@cache
def hits(width: int) -> dict[str, float]:
    """Share of the trials in which a search chose one of ``width`` planted keys."""
    generator = torch.Generator().manual_seed(width)
    counted = dict.fromkeys(PLANTED, 0)
    for _ in range(TRIALS // 8):
        query = torch.randn(1, 8, 1, DIM, generator=generator)
        key = torch.randn(1, 8, CONTEXT, DIM, generator=generator)
        place = torch.randint(512, CONTEXT - 2048, (8,), generator=generator).tolist()
        for head, first in enumerate(place):
            key[0, head, first : first + width] += 6 * query[0, head] / query[0, head].norm()
        for name, search in PLANTED.items():
            starts = search.select(query, key, None)[0, :, 0]
            for head, first in enumerate(place):
                inside = (starts[head] > first - search.scope.block_k) & (starts[head] < first + width)
                counted[name] += bool(inside.any())
    return {name: count / TRIALS for name, count in counted.items()}


@pytest.mark.slow
def test_wide_evidence_is_found_and_a_single_token_often_is_not() -> None:
    single, few, span = hits(1), hits(4), hits(16)
    assert span["bisected"] == span["default"] == 1.0
    assert span["exact"] == few["exact"] == single["exact"] == 1.0
    assert single == pytest.approx({"bisected": 0.260, "default": 0.365, "tree": 0.146, "exact": 1.0}, abs=CLOSE)
    assert few == pytest.approx({"bisected": 0.615, "default": 0.615, "tree": 0.354, "exact": 1.0}, abs=CLOSE)
