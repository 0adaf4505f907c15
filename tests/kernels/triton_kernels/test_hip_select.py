"""The Triton kernel of the stage scores against the reference, and the whole search against plain torch."""

from __future__ import annotations

import pytest
import torch

from llm_accel.kernels.hip_select import ABSENT, Scope, Stage, StageSearch, stages
from llm_accel.kernels.hip_select.candidates import Keys
from llm_accel.kernels.hip_select.launch import stage_score_triton
from llm_accel.kernels.hip_select.reference import stage_score_reference
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
    ours = stage_score_triton(reps, keys, starts, end, chunk, exact, level)
    oracle = stage_score_reference(reps, keys, starts, end, chunk, exact, level)
    present = starts < ABSENT
    assert_close("score", ours[present], oracle[present], dtype)
    assert (ours[~present] == float("-inf")).all()


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
    assert stages.OP.choose(Keys.of(key, None).problem).name == "triton"
    ours = search.select(query, key, start)
    monkeypatch.setattr(stages, "OP", stages.Op("hip_select", stages.OP.backends[-1]))
    assert torch.equal(ours, search.select(query, key, start))
