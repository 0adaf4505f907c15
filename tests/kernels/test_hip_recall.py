"""How much of the attention the searches find, on seeded synthetic data: a change that costs quality shows here.

Two settings. Keys with a correlation length, and queries that point at one earlier key for 8 rows at a time; and one
query after 32768 keys, with a few keys planted that stand out by six standard deviations.

``STUDY`` and ``STUDY_HITS`` are figures of a study of the same two settings with other random numbers, one draw each.
It does not say which query blocks were measured, nor how many rows of a block its tree scored; here it is all blocks of
the second half, and all rows. Our figures are averages over draws, within 0.03 of the study's but for those in ``OURS``
and ``OUR_HITS``. Between our own draws a share of the attention varies by .01 to .02 (standard deviation; by .03 to .07
if four to eight query blocks are measured), and a hit rate of 96 trials, as the study has, by .05. Where keys change
over 64 tokens the exhaustive search differs as much as the others, and all of them find the same share of the best
tokens as in the study: the difference is one of the data.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from llm_accel.kernels.hip_select import ABSENT, ExactSearch, Scope, Search, Stage, StageSearch, TreeSearch

LENGTH, DIM, BUDGET, BLOCK_Q = 8192, 64, 512, 64
DRAWS, UNIFORM_DRAWS = 8, 2
MEASURED = range(64, 128)  # query blocks: the second half
CLOSE = 0.03


def scope(block_k: int) -> Scope:
    return Scope(sink=64, window=256, block_q=BLOCK_Q, block_k=block_k)


def stages(chunk: int, stride: int = 1, last_exact: bool = False) -> StageSearch:
    entering = (Stage(chunk, None, 4), Stage(32, 4096, 4), Stage(8, 2048, stride))
    return StageSearch(scope(8), BUDGET, entering, last_exact)


RAW: dict[str, Search] = {
    "stages": stages(256),
    "fine_stages": stages(64),
    "tree_2": TreeSearch(scope(2), BUDGET, stride=1),
    "tree_8": TreeSearch(scope(8), BUDGET, stride=1),
    "exact_8": ExactSearch(scope(8), BUDGET),
    "exact_2": ExactSearch(scope(2), BUDGET),
    "exact_last_stage": stages(256, last_exact=True),
    "benchmark": stages(256, stride=4, last_exact=True),  # as benchmarks/hip_cpu.py
}
# the study compares products; what a fair comparison finds where no head is louder than another stands further below
SEARCHES = {name: replace(search, fair=False) for name, search in RAW.items()}


@cache
def draw(correlation: int, peaked: bool, seed: int, hold: int = 8) -> tuple[Tensor, Tensor]:
    """Queries [1, 2, T, D] and keys [1, 1, T, D]; ``correlation``: tokens after which keys have changed; ``hold``: rows
    that point at one key."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(LENGTH, DIM, generator=generator)
    key = noise.clone()
    if correlation:
        decay = math.exp(-1 / correlation)
        for position in range(1, LENGTH):
            key[position] = decay * key[position - 1] + math.sqrt(1 - decay**2) * noise[position]
    first = torch.arange(0, LENGTH, hold)
    query = torch.randn(2, LENGTH, DIM, generator=generator)
    target = (torch.rand(2, len(first), generator=generator) * first.clamp(min=1)).long().repeat_interleave(hold, 1)
    return (query + 4 * key[target] if peaked else query)[None], key[None, None]


@cache
def attention(correlation: int, peaked: bool, seed: int, hold: int = 8) -> tuple[Tensor, Tensor]:
    """The attention of each measured query block, added up over its queries, and the best logit: [n, T] each."""
    query, key = draw(correlation, peaked, seed, hold)
    summed, best = torch.empty(len(MEASURED), LENGTH), torch.empty(len(MEASURED), LENGTH)
    for index, block in enumerate(MEASURED):
        rows = torch.arange(block * BLOCK_Q, (block + 1) * BLOCK_Q)
        logits = query[0, :, rows] @ key[0, 0].T / math.sqrt(DIM)
        logits = logits.masked_fill(torch.arange(LENGTH) > rows[:, None], float("-inf"))
        summed[index], best[index] = logits.softmax(-1).sum((0, 1)), logits.amax((0, 1))
    return summed, best


def found(search: Search, correlation: int, peaked: bool, seed: int, hold: int = 8) -> tuple[float, float]:
    """Share of the attention between sink and window, and share of its best 512 tokens, that the choice holds."""
    query, key = draw(correlation, peaked, seed, hold)
    starts = search.select(query[:, :, MEASURED.start * BLOCK_Q :], key, None)[0, 0]
    ends = search.scope.window_start(LENGTH, LENGTH, None, key.device)[0, MEASURED.start :]
    held, mass, recall = 0.0, 0.0, []
    for begin, end, summed, logits in zip(starts, ends, *attention(correlation, peaked, seed, hold), strict=True):
        chosen = torch.zeros(LENGTH, dtype=torch.bool)
        chosen[(begin[begin < ABSENT, None] + torch.arange(search.scope.block_k)).flatten()] = True
        far = slice(search.scope.sink, int(end))
        held, mass = held + float(summed[chosen].sum()), mass + float(summed[far].sum())
        recall.append(chosen[logits[far].topk(BUDGET).indices + far.start].float().mean())
    return held / mass, float(torch.stack(recall).mean())


Shares = dict[tuple[int, str], tuple[float, float]]

# correlation length, search -> share of the attention, share of the best tokens; queries that point at one key
STUDY: Shares = {
    (0, "stages"): (0.289, 0.207),
    (0, "fine_stages"): (0.340, 0.206),
    (0, "tree_2"): (0.304, 0.359),
    (0, "tree_8"): (0.341, 0.197),
    (0, "exact_8"): (1.000, 0.205),
    (0, "exact_2"): (1.000, 0.533),
    (4, "stages"): (0.781, 0.420),
    (4, "fine_stages"): (0.872, 0.446),
    (4, "tree_2"): (0.964, 0.655),
    (4, "tree_8"): (0.617, 0.382),
    (4, "exact_8"): (1.000, 0.480),
    (4, "exact_2"): (1.000, 0.741),
    (16, "stages"): (0.941, 0.833),
    (16, "fine_stages"): (0.9985, 0.858),
    (16, "tree_2"): (1.000, 0.942),
    (16, "tree_8"): (0.932, 0.816),
    (16, "exact_8"): (1.000, 0.863),
    (16, "exact_2"): (1.000, 0.945),
    (64, "stages"): (0.811, 0.921),
    (64, "fine_stages"): (0.811, 0.926),
    (64, "tree_2"): (0.840, 0.976),
    (64, "tree_8"): (0.813, 0.927),
    (64, "exact_8"): (0.813, 0.927),
    (64, "exact_2"): (0.839, 0.976),
}
OURS: Shares = {
    (0, "tree_2"): (0.353, 0.352),
    (4, "tree_8"): (0.567, 0.361),
    (16, "stages"): (0.905, 0.802),
    (64, "stages"): (0.861, 0.919),
    (64, "fine_stages"): (0.861, 0.920),
    (64, "tree_2"): (0.891, 0.973),
    (64, "tree_8"): (0.861, 0.922),
    (64, "exact_8"): (0.862, 0.922),
    (64, "exact_2"): (0.891, 0.973),
    # searches that the study does not have
    (0, "exact_last_stage"): (0.474, 0.202),
    (0, "benchmark"): (0.474, 0.202),
    (4, "exact_last_stage"): (0.755, 0.420),
    (4, "benchmark"): (0.755, 0.419),
    (16, "exact_last_stage"): (0.905, 0.805),
    (16, "benchmark"): (0.905, 0.802),
    (64, "exact_last_stage"): (0.861, 0.921),
    (64, "benchmark"): (0.864, 0.918),
}
# queries that point nowhere
STUDY_UNIFORM: Shares = {
    (0, "stages"): (0.098, 0.198),
    (0, "fine_stages"): (0.098, 0.200),
    (0, "exact_8"): (0.099, 0.202),
    (0, "exact_2"): (0.107, 0.537),
    (64, "stages"): (0.113, 0.559),
    (64, "fine_stages"): (0.114, 0.580),
    (64, "exact_8"): (0.113, 0.726),
    (64, "exact_2"): (0.114, 0.876),
}


def mean_found(name: str, correlation: int, peaked: bool) -> tuple[float, float]:
    draws = DRAWS if peaked else UNIFORM_DRAWS  # which hardly differ
    shares = [found(SEARCHES[name], correlation, peaked, seed) for seed in range(draws)]
    mass, recall = torch.tensor(shares).mean(0).tolist()
    return mass, recall


@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "name"), STUDY | OURS)
def test_the_share_of_attention_that_is_found(correlation: int, name: str) -> None:
    expected = (STUDY | OURS)[correlation, name]
    assert mean_found(name, correlation, peaked=True) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "name"), STUDY_UNIFORM)
def test_even_attention_is_not_found(correlation: int, name: str) -> None:
    expected = STUDY_UNIFORM[correlation, name]
    assert mean_found(name, correlation, peaked=False) == pytest.approx(expected, abs=CLOSE)


# of one draw, the share of the attention: compared fairly, and by products
FAIR: dict[tuple[int, str], tuple[float, float]] = {
    (4, "exact_8"): (0.986, 1.000),
    (4, "exact_last_stage"): (0.746, 0.759),
    (4, "tree_8"): (0.558, 0.585),
    (16, "exact_8"): (0.956, 1.000),
    (16, "exact_last_stage"): (0.853, 0.896),
    (16, "tree_8"): (0.855, 0.940),
}


@pytest.mark.slow
@pytest.mark.parametrize(("correlation", "name"), FAIR)
def test_what_a_fair_comparison_gives_up_where_all_heads_are_alike(correlation: int, name: str) -> None:
    """Nobody is loud here, so that the estimate of each query's level can only cost: 1 to 9 of 100."""
    ways = RAW[name], SEARCHES[name]
    assert tuple(found(way, correlation, True, 0)[0] for way in ways) == pytest.approx(
        FAIR[correlation, name], abs=CLOSE
    )


# rows that point at one key, correlation length, stride of the last stage, compared fairly
STRIDES: dict[tuple[int, int, int], tuple[float, float]] = {
    (8, 4, 1): (0.738, 0.390),
    (8, 4, 4): (0.739, 0.386),
    (8, 16, 1): (0.852, 0.676),
    (8, 16, 4): (0.857, 0.676),
    (1, 4, 1): (0.493, 0.487),
    (1, 4, 2): (0.471, 0.469),
    (1, 4, 4): (0.394, 0.398),
    (1, 16, 1): (0.392, 0.520),
    (1, 16, 2): (0.376, 0.499),
    (1, 16, 4): (0.351, 0.463),
}


@pytest.mark.slow
@pytest.mark.parametrize(("hold", "correlation", "stride"), STRIDES)
def test_what_a_stride_in_the_last_stage_costs(hold: int, correlation: int, stride: int) -> None:
    """Nothing where neighbouring queries want the same keys, up to a fifth where each wants another."""
    search = stages(256, stride, last_exact=True)
    mean = torch.tensor([found(search, correlation, True, seed, hold) for seed in range(3)]).mean(0).tolist()
    assert mean == pytest.approx(STRIDES[hold, correlation, stride], abs=CLOSE)


# --- planted keys ----------------------------------------------------------------------------------------------------


def planted(block_k: int) -> Scope:
    return Scope(sink=256, window=1024, block_q=16, block_k=block_k)


PLANTED: dict[str, Search] = {
    "256/32/8": StageSearch(planted(8), 2048, (Stage(256, None, 1), Stage(32, 32768, 1), Stage(8, 8192, 1)), False),
    "64/32/16": StageSearch(planted(16), 2048, (Stage(64, None, 1), Stage(32, 32768, 1), Stage(16, 8192, 1)), False),
    "16/8": StageSearch(planted(8), 2048, (Stage(16, None, 1), Stage(8, 8192, 1)), False),
    "tree_2": TreeSearch(planted(2), 2048, stride=1),
    "tree_8": TreeSearch(planted(8), 2048, stride=1),
    "default": StageSearch(planted(8), 2048, (Stage(256, None, 1), Stage(32, 32768, 1), Stage(8, 8192, 1))),
    "16/8 exact": StageSearch(planted(8), 2048, (Stage(16, None, 1), Stage(8, 16384, 1))),
    "exact": ExactSearch(planted(8), 2048),
}
TRIALS, CONTEXT, HEADS = 1024, 32768, 8

# planted keys -> search -> share of the trials
STUDY_HITS: dict[int, dict[str, float]] = {
    1: dict(zip(PLANTED, (0.31, 0.32, 0.38, 0.26, 0.24, 0.45, 0.67, 1.00), strict=True)),
    4: dict(zip(PLANTED, (0.63, 0.70, 0.92, 0.59, 0.24, 0.63, 0.94, 1.00), strict=True)),
    16: dict(zip(PLANTED, (1.00, 1.00, 1.00, 1.00, 0.64, 1.00, 1.00, 1.00), strict=True)),
}
OUR_HITS: dict[int, dict[str, float]] = {
    1: {"64/32/16": 0.281, "16/8 exact": 0.724},
    4: {"256/32/8": 0.699, "64/32/16": 0.589, "16/8": 0.855, "tree_8": 0.335, "default": 0.704},
}


def hits(width: int) -> dict[str, float]:
    """Share of the trials in which a search chose one of ``width`` planted keys; keys are drawn once, each trial has a
    query and a place of its own."""
    generator = torch.Generator().manual_seed(width)
    key = torch.randn(1, HEADS, CONTEXT, DIM, generator=generator)
    counted = dict.fromkeys(PLANTED, 0)
    for _ in range(TRIALS // HEADS):
        query = torch.randn(1, HEADS, 1, DIM, generator=generator)
        place = torch.randint(512, CONTEXT - 2048, (HEADS,), generator=generator)
        slots = place[:, None] + torch.arange(width)
        plain = key[0, torch.arange(HEADS)[:, None], slots]
        key[0, torch.arange(HEADS)[:, None], slots] = plain + 6 * torch.nn.functional.normalize(query[0], dim=-1)
        for name, search in PLANTED.items():
            starts = search.select(query, key, None)[0, :, 0]
            inside = (starts > place[:, None] - search.scope.block_k) & (starts < place[:, None] + width)
            counted[name] += int(inside.any(-1).sum())
        key[0, torch.arange(HEADS)[:, None], slots] = plain
    return {name: count / TRIALS for name, count in counted.items()}


@pytest.mark.slow
@pytest.mark.parametrize("width", STUDY_HITS)
def test_wide_evidence_is_found_and_a_single_token_often_is_not(width: int) -> None:
    expected = STUDY_HITS[width] | OUR_HITS.get(width, {})
    assert hits(width) == pytest.approx(expected, abs=CLOSE)
