"""EVS and VidCom2 against versions in float64 that go token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_accel import EVS, ConfigError, VidCom2
from tests import selection_oracle


def video(seed: int, frames: int, places: int) -> Tensor:
    """Frames that resemble the first one, each to another degree."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, places, 12, generator=generator)
    return still + torch.rand(frames, 1, 1, generator=generator) * torch.randn(frames, places, 12, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8))
def test_tokens_of_evs(seed: int, frames: int, places: int, budget: int) -> None:
    given_frames, method = video(seed, frames, places), EVS(budget=budget)
    keep = method.keep(given_frames)
    kept = max(places, frames * min(budget, places))
    assert int(keep.sum()) == method.total(frames, places) == kept
    assert [tuple(at) for at in keep.nonzero().tolist()] == selection_oracle.evs(given_frames, kept)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.01, 0.2, 5.0])
)
def test_tokens_of_vidcom2(seed: int, frames: int, places: int, budget: int, tau: float) -> None:
    given_frames, method = video(seed, frames, places), VidCom2(budget=budget, tau=tau)
    keep, kept = method.keep(given_frames), frames * min(budget, places)
    assert int(keep.sum()) == kept
    wanted, order = selection_oracle.vidcom2(given_frames, kept, tau)
    counts = keep.sum(-1).tolist()
    full = [places <= number for number in wanted]
    for t, count in enumerate(counts):
        assert sorted(order[t][:count]) == keep[t].nonzero()[:, 0].tolist()
        assert count >= min(places, int(wanted[t]))
        assert any(full) or count <= int(wanted[t]) + 1  # what full frames cannot take goes to others


def test_what_stands_still_leaves_and_what_moves_stays() -> None:
    frames = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    frames[1, 4] *= -1  # changes, and changes back
    kept = EVS(budget=3).keep(frames)
    assert kept[0].all() and [kept[t].nonzero()[:, 0].tolist() for t in (1, 2)] == [[0, 4], [4]]
    assert EVS(ratio=0.01).keep(frames).sum() == 6  # the first frame at least


def test_a_frame_unlike_the_others_keeps_more() -> None:
    frames = torch.ones(4, 8, 6) + 0.01 * torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    frames[2] = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    counts = VidCom2(ratio=0.5).keep(frames).sum(-1).tolist()
    assert counts[2] == max(counts) > counts[0] and sum(counts) == 16
    assert VidCom2(ratio=0.5, tau=1e6).keep(frames).sum(-1).tolist() == [4, 4, 4, 4]


def test_a_frame_that_is_a_copy_loses_all() -> None:
    frames = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)
    assert EVS(ratio=0.2).keep(frames).sum(-1).tolist() == [5, 0]


def test_options() -> None:
    with pytest.raises(ConfigError, match="tau=0"):
        VidCom2(tau=0)
    with pytest.raises(ConfigError, match="budget"):
        EVS(budget=4, ratio=0.5)
