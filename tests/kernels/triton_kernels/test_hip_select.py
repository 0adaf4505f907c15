"""The Triton kernels of a search by stages against the reference, and the whole search against plain torch."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels import dispatch
from llm_accel.kernels.hip_select import ABSENT, OP, Scope, Stage, StageSearch, launch, reference
from llm_accel.kernels.hip_select.candidates import Keys
from tests.kernels.triton_device import DEVICE, assert_close


@pytest.mark.parametrize("fair", [False, True], ids=["raw", "fair"])
@pytest.mark.parametrize("exact", [False, True], ids=["bisect", "exact"])
@pytest.mark.parametrize(
    ("dtype", "dim", "queries", "heads"),
    [
        (torch.float32, 64, 6, 2),
        (torch.float32, 80, 17, 1),
        (torch.float16, 32, 70, 1),
        (torch.bfloat16, 64, 4, 2),
        (torch.float32, 256, 40, 1),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_scores_of_chunks(dtype: torch.dtype, dim: int, queries: int, heads: int, exact: bool, fair: bool) -> None:
    """Padded rows, a last chunk that the end cuts, and chunks that are absent."""
    generator = torch.Generator().manual_seed(dim)
    batch, blocks, slots, chunk = 2, 2, 90, 8
    reps = torch.randn(batch, heads, blocks, queries, dim, generator=generator).to(dtype).float().to(DEVICE)
    key = torch.randn(batch, heads, slots, dim, generator=generator).to(dtype).to(DEVICE)
    end = torch.tensor([[40, 68], [24, 44]], device=DEVICE)[:, None, :, None]
    starts = torch.arange(0, 72, chunk, device=DEVICE).expand(batch, heads, blocks, -1)
    starts = torch.where(starts < end // chunk * chunk if exact else starts < end, starts, ABSENT)
    keys = Keys.of(key, torch.tensor([0, 13], device=DEVICE))
    level = 3 * torch.randn(batch, heads, blocks, queries, generator=generator).to(DEVICE) if fair else None
    ours = launch.score(reps, keys, starts, end, chunk, exact, level)
    oracle = reference.score(reps, keys, starts, end, chunk, exact, level)
    present = starts < ABSENT
    assert_close("score", ours[present], oracle[present], dtype)
    assert (ours[~present] == float("-inf")).all()


@pytest.mark.parametrize(
    ("dtype", "dim", "queries"),
    [(torch.float32, 64, 6), (torch.float32, 80, 17), (torch.bfloat16, 64, 4), (torch.float16, 32, 70)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_levels_of_queries(dtype: torch.dtype, dim: int, queries: int) -> None:
    """Padded rows; candidates that end before the first sampled key, at none at all, and far behind."""
    generator = torch.Generator().manual_seed(dim)
    reps = torch.randn(2, 2, 3, queries, dim, generator=generator).to(dtype).to(DEVICE)
    key = torch.randn(2, 2, 300, dim, generator=generator).to(dtype).to(DEVICE)
    end = torch.tensor([[0, 8, 296], [5, 64, 200]], device=DEVICE)[:, None, :, None]
    keys = Keys.of(key, torch.tensor([0, 13], device=DEVICE))
    for ends in (end, end[:1]):
        ours, oracle = (steps.level(reps, keys, ends, 0.2) for steps in (launch, reference))
        assert_close("level", ours, oracle, dtype)


@pytest.mark.parametrize("moved", [None, 1, 20])
@pytest.mark.parametrize(("chunk", "part"), [(32, 8), (8, 8), (16, 4)])
def test_chunks_enter(chunk: int, part: int, moved: int | None) -> None:
    kept = torch.randint(6, (2, 3, 2, 5), generator=torch.Generator().manual_seed(chunk)).sort(-1).values * chunk + 16
    kept[0, :, :, 3:] = ABSENT
    end = torch.tensor([[40, 160], [24, 208]], device=DEVICE)[:, None, :, None]
    then, fresh = (None, 0) if moved is None else ((end - moved).clamp(min=16) // 8 * 8, -(-(moved + 16) // part))
    for ends in (end, end[:1]):
        given = (kept.to(DEVICE), then, ends, chunk, part, 16, fresh)
        assert torch.equal(launch.enter(*given), reference.enter(*given))
        first = (None, None, ends, part, part, 16, 25)
        assert torch.equal(launch.enter(*first), reference.enter(*first))


@pytest.mark.parametrize(("chunks", "count"), [(9, 4), (200, 199), (300, 1), (130, 64)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_chunks_are_kept(chunks: int, count: int, ties: bool) -> None:
    """Scores of either sign, equal ones, both zeros and infinities; absent chunks anywhere, more of them than there is
    place for, and nothing but absent ones."""
    generator = torch.Generator().manual_seed(chunks)
    score = torch.randn(2, 2, 3, chunks, generator=generator) * 10.0
    if ties:
        score = score.round().clamp(-2, 2)
    score[0, 0, 0, :3] = torch.tensor([float("-inf"), -0.0, 0.0])
    score[0, 0, 1, 2], score[1, 1, 0, 5] = float("inf"), -1e-40
    starts = torch.arange(chunks).mul(8).expand(2, 2, 3, -1).clone()
    starts[0, 1] = starts[0, 1].masked_fill(torch.rand(3, chunks, generator=generator) < 0.7, ABSENT)
    starts[1, 0, 2] = ABSENT
    score[starts == ABSENT] = torch.nan
    ours = launch.keep(score.to(DEVICE), starts.to(DEVICE), count)
    assert torch.equal(ours.cpu(), reference.keep(score, starts, count))
    shared = score[:, :1].nan_to_num().expand_as(score)  # one choice of all heads
    assert torch.equal(launch.keep(shared, starts, count).cpu(), reference.keep(shared, starts, count))


def test_more_chunks_than_a_program_holds_are_sorted() -> None:
    score, starts = torch.rand(1, 1, 1, 4100), torch.arange(4100).view(1, 1, 1, -1)
    assert torch.equal(launch.keep(score, starts, 5), reference.keep(score, starts, 5))


@pytest.mark.parametrize("fair", [False, True], ids=["raw", "fair"])
@pytest.mark.parametrize("queries", [1, 60])
def test_a_whole_search_chooses_what_plain_torch_chooses(
    queries: int, fair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 16, generator=generator).to(DEVICE)
    key = torch.randn(2, 2, 200, 16, generator=generator).to(DEVICE)
    search = StageSearch(Scope(8, 20, 16, 8), 48, (Stage(32, None, 4), Stage(8, 96, 1)), fair=fair)
    start = torch.tensor([0, 31], device=DEVICE)
    problem = Keys.of(key, None).problem
    assert OP.choose(problem).name == "triton"
    ours = search.select(query, key, start)
    monkeypatch.setenv(dispatch.VARIABLE, "hip_select=torch")
    dispatch._requests.cache_clear()
    try:
        assert OP.choose(problem).name == "torch"
        assert torch.equal(ours, search.select(query, key, start))
    finally:
        monkeypatch.undo()
        dispatch._requests.cache_clear()
