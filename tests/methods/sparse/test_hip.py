"""HiP: its options, and what it remembers between decode steps against a simulation with lists."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_accel import ConfigError, HiP
from llm_accel.kernels.hip_select import ABSENT, ExactSearch, Scope, Search, Stage, StageSearch
from llm_accel.methods.sparse.hip_decode import DecodeMemory, decode_step
from llm_accel.registry import parse

STAGES = ((64, None, 2), (8, 512, 1))


def test_python_json_and_the_command_line_agree() -> None:
    config = HiP(budget=512, window=256, stages=STAGES, refresh=(8, 2), edge_layers=(), dense_layers=(0, -1))
    text = "hip:budget=512,window=256,stages=64:None:2+8:512:1,refresh=8+2,edge_layers=,dense_layers=0+-1"
    assert parse(text) == config
    assert parse(config.spec()) == config
    data = json.loads(json.dumps(config.changed()))
    assert HiP(**data) == config
    assert hash(HiP(**data)) == hash(config)
    assert parse("hip:min_prefill_len=auto,budget_edge=none") == HiP()
    assert parse("hip:min_prefill_len=4096") == HiP(min_prefill_len=4096)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "chunk_no_power": ({"stages": ((96, None, 4), (8, 512, 1)), "refresh": (8, 2)}, "powers of two"),
    "chunks_rise": ({"stages": ((8, None, 4), (64, 512, 1)), "refresh": (8, 2)}, "falling chunks"),
    "chunk_without_kernel": ({"stages": ((64, None, 4), (4, 512, 1)), "refresh": (8, 2)}, "last one of 8, 16"),
    "no_stages": ({"stages": (), "refresh": ()}, "stages"),
    "first_entered_by_some": ({"stages": ((64, 1024, 4), (8, 512, 1)), "refresh": (8, 2)}, "None for the first"),
    "later_entered_by_all": ({"stages": ((64, None, 4), (8, None, 1)), "refresh": (8, 2)}, "multiple of the chunk"),
    "tokens_cut_a_chunk": ({"stages": ((64, None, 4), (8, 500, 1)), "refresh": (8, 2)}, "multiple of the chunk"),
    "tokens_rise": (
        {"stages": ((64, None, 4), (16, 256, 1), (8, 512, 1)), "budget": 128},
        "no more than entered",
    ),
    "stage_of_two": ({"stages": ((64, None),)}, "a tuple"),
    "budget_cuts_a_block": ({"budget": 100}, "multiple of 8"),
    "budget_above_the_last_stage": ({"budget": 16384}, "up to 8192"),
    "budget_zero": ({"budget": 0}, "multiple of 8"),
    "edge_budget": ({"budget_edge": 3}, "multiple of 8"),
    "block_q": ({"block_q": 48}, "one of 16, 32, 64, 128"),
    "stride": ({"stages": ((64, None, 128), (8, 4096, 1)), "refresh": (8, 2)}, "multiple of every stride"),
    "refresh_short": ({"refresh": (16, 8)}, "3 integers"),
    "refresh_not_nested": ({"refresh": (16, 6, 4)}, "dividing the one before"),
    "refresh_zero": ({"refresh": (16, 8, 0)}, "above 0"),
    "window": ({"window": 16}, "above 16"),
    "sink": ({"sink": -1}, "at least 0"),
    "min_prefill_len": ({"min_prefill_len": -1}, "or 'auto'"),
    "min_prefill_word": ({"min_prefill_len": "never"}, "'auto'"),
    "selector": ({"selector": "best"}, "'stages' or 'tree' or 'exact'"),
    "share_heads": ({"share_heads": "some"}, "'group' or 'all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        HiP(**options)


def test_text_that_is_no_stage_is_refused() -> None:
    for text in ("64", "64:None", "64:None:1:1", "a:None:1"):
        with pytest.raises(ConfigError, match="stages="):
            parse(f"hip:stages={text}")


def test_the_break_even_is_that_of_the_device() -> None:
    assert HiP().break_even("cuda") == 32768
    assert HiP().break_even("cpu") < HiP().break_even("cuda")
    assert HiP(min_prefill_len=5).break_even("cuda") == 5


# --- decode ----------------------------------------------------------------------------------------------------------

SCOPE = Scope(sink=8, window=24, block_q=16, block_k=8)
SEARCH = StageSearch(SCOPE, 32, (Stage(32, None, 1), Stage(16, 96, 1), Stage(8, 64, 1)))
REFRESH = (8, 4, 2)


class Simulation:
    """One row and head: the same rules with lists of starts, and all scores from single products."""

    def __init__(self) -> None:
        self.step, self.kept, self.ends = -1, [[], [], []], [8, 8, 8]

    def advance(self, query: Tensor, key: Tensor) -> tuple[list[int], int]:
        """Chosen starts and the begin of the window; query [D], key [S, D]."""
        self.step += 1
        end = max(8, (len(key) - 24) // 8 * 8)
        due = next((stage for stage, period in enumerate(REFRESH) if self.step % period == 0), None)
        if due is None:
            return self.kept[-1], self.ends[-1]
        for stage in range(due, 3):
            chunk = SEARCH.stages[stage].chunk
            if stage == 0:
                starts = set(range(8, end, chunk))
            else:
                parts = range(0, SEARCH.stages[stage - 1].chunk, chunk)
                starts = {start + part for start in self.kept[stage - 1] for part in parts}
                # what left the window since the stage before chose
                starts |= {start for start in range(8, end, chunk) if start + chunk > self.ends[stage - 1]}
                starts = {start for start in starts if start < end}
            score = {start: self._score(query, key, start, min(start + chunk, end), stage) for start in starts}
            best = sorted(starts, key=lambda start: (-score[start], start))[: SEARCH.kept(stage)]
            self.kept[stage], self.ends[stage] = sorted(best), end
        return self.kept[-1], end

    def _score(self, query: Tensor, key: Tensor, low: int, high: int, stage: int) -> float:
        if stage == 2:
            return float((key[low:high] @ query).max())
        found = -float("inf")
        for _ in range(SEARCH.stages[stage].chunk.bit_length()):
            middle = (low + high) // 2
            left, right = (float(key[(a + b) // 2] @ query) for a, b in ((low, middle), (middle, high)))
            low, high = (low, middle) if left >= right else (middle, high)
            found = max(found, left, right)
        return found


def steps(search: Search, key: Tensor, query: Tensor, first: int, start: Tensor | None) -> list[Any]:
    """(chosen starts [B, H, M] as lists, begin of the window [B]) of each step from ``first`` slots on."""
    seen, memory, limit = [], None, search.scope.sink + search.scope.window + search.budget
    refresh = REFRESH if isinstance(search, StageSearch) else REFRESH[-1:]
    for slots in range(first, key.shape[2] + 1):
        one = query[:, :, slots - 1 : slots]
        blocks, memory = decode_step(one, key[:, :, :slots], start, search, refresh, slots <= limit, memory)
        assert isinstance(memory, DecodeMemory)
        if blocks is None:
            seen.append(None)
            continue
        starts = [[[s for s in head if s < ABSENT] for head in row] for row in memory.kept[-1][:, :, 0].tolist()]
        seen.append((starts, blocks.window_start[:, 0, 0].tolist()))
    return seen


def tensors(batch: int, slots: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(batch, 2, slots, 8, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_decoding_follows_the_simulation() -> None:
    query, key = tensors(1, 230)
    rows = [Simulation(), Simulation()]
    for slots, (starts, begin) in zip(range(180, 231), steps(SEARCH, key, query, 180, None), strict=True):
        for head, row in enumerate(rows):
            expected, window = row.advance(query[0, head, slots - 1], key[0, head, :slots])
            assert starts[0][head] == expected, slots
            assert begin == [window]


@pytest.mark.parametrize("search", [SEARCH, ExactSearch(SCOPE, 32)], ids=["stages", "exact"])
def test_rows_that_outgrow_the_budget_while_decoding_choose_what_they_choose_alone(search: Search) -> None:
    query, key = tensors(3, 230)
    start = torch.tensor([0, 100, 120])
    together = steps(search, key, query, 150, start)
    for row, padding in enumerate(start.tolist()):
        alone = steps(search, key[row : row + 1, :, padding:], query[row : row + 1, :, padding:], 150 - padding, None)
        compared = 0
        for both, single in zip(together, alone, strict=True):
            if single is not None:
                assert both[0][row] == single[0][0]
                assert both[1][row] == single[1][0]
                compared += 1
        assert compared


def test_the_memory_starts_over_when_the_length_jumps() -> None:
    query, key = tensors(1, 230)
    call = (SEARCH, REFRESH, False)
    _, memory = decode_step(query[:, :, 199:200], key[:, :, :200], None, *call, None)
    _, after = decode_step(query[:, :, 200:201], key[:, :, :201], None, *call, memory)
    assert after.step == 1
    for slots in (201, 203, 150):
        _, jumped = decode_step(query[:, :, :1], key[:, :, :slots], None, *call, after)
        assert jumped.step == 0
        assert jumped.seen == (slots,) * 3


def test_the_memory_follows_its_rows_and_can_be_stored() -> None:
    query, key = tensors(2, 230)
    _, memory = decode_step(query[:, :, -1:], key, None, SEARCH, REFRESH, False, None)
    assert DecodeMemory.of(*memory.state()).seen == memory.seen
    turned = memory.map_rows(lambda rows: rows.flip(0))
    for kept, before, stored in zip(turned.kept, memory.kept, DecodeMemory.of(*memory.state()).kept, strict=True):
        assert torch.equal(kept, before.flip(0))
        assert torch.equal(stored, before)
