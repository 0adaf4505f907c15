"""How many operations a decode step hands to the device: what a GPU waits for when its kernels are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llm_accel
from llm_accel.kernels import (
    block_sparse,
    column_votes,
    compaction,
    dispatch,
    hip_select,
    ragged_decode,
    slot_decode,
    slot_write,
)
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.hip_select import Keys
from llm_accel.patches.cache_name import CACHE
from tests.tiny import prompt, tiny_model

LAYERS, STEPS = 2, 8


def _block_sparse(
    query: Any, key: Any, value: Any, start: Any, scaling: Any, cap: Any, sinks: Any, *fields: Any
) -> Any:
    return block_sparse.OP.backends[-1].run(query, key, value, BlockList(*fields), start, scaling, cap, sinks)


def _stage_score(representative: Any, rows: Any, origin: Any, last: Any, *rest: Any) -> Any:
    return hip_select.OP.backends[-1].run(representative, Keys(rows, origin, last), *rest)


# what each kernel of ours would give, so that a CPU can walk through the steps of a GPU
STAND_INS: dict[str, Callable[..., Any]] = {
    "block_sparse_attention": _block_sparse,
    "column_votes": column_votes.OP.backends[-1].run,
    "gather_entries": lambda *given: [part for part in compaction.OP.backends[-1].run(*given) if part is not None],
    "hip_stage_score": _stage_score,
    "ragged_attention": ragged_decode.OP.backends[-1].run,
    "slot_decode": slot_decode.OP.backends[-1].run,
    "slot_write": slot_write.OP.backends[-1].run,
}


class Operations(TorchDispatchMode):
    """Counts operations, each kernel of ours as one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        run = STAND_INS[func._opname] if func.namespace == "llm_accel" else func
        return run(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen as on a GPU."""
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda device: None)
    with Operations():  # the prompt too needs stand-ins
        yield


def steps(method: str, **options: Any) -> list[Counter[str]]:
    """Operations of each decode step after a prompt of 160 tokens."""
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    found = []
    with torch.no_grad(), llm_accel.apply(model, method, **options) as handle:
        cache, token = handle.new_cache(), prompt(160, 3)
        for _ in range(STEPS + 1):
            with Operations() as operations:
                token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            found.append(operations.counts)
    return found[1:]


def extra(counts: Counter[str], dense: int) -> float:
    """Operations of a layer beside those of dense decoding."""
    return (counts.total() - dense) / LAYERS


# per layer, beside those of dense decoding, which takes one more or less by the version of transformers
@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("snapkv", {"budget": 48, "window": 8}, 0),
        ("streaming_llm", {"budget": 48}, 12),
        ("h2o", {"budget": 48}, 8),
        ("adakv", {"budget": 48, "window": 8}, 11),
    ],
)
def test_a_step_takes_few_more_than_dense_decoding(method: str, options: dict[str, Any], most: int) -> None:
    dense = steps("dense")[-1].total()
    assert max(extra(counts, dense) for counts in steps(method, **options)) <= most


def test_hip_adds_nothing_between_two_choices() -> None:
    options: dict[str, Any] = {"sink": 16, "window": 32, "budget": 32, "min_prefill_len": 0, "refresh": (4, 2)}
    options |= {"stages": ((32, None, 4), (8, 64, 1)), "edge_layers": ()}
    dense, found = steps("dense")[-1].total(), steps("hip", **options)
    assert all(counts["llm_accel::block_sparse_attention"] == LAYERS for counts in found)
    chose = [counts["llm_accel::hip_stage_score"] > 0 for counts in found]
    assert chose[:4] == [True, False, True, False]
    assert max(extra(counts, dense) for counts, new in zip(found, chose, strict=True) if not new) <= 0
    assert max(extra(counts, dense) for counts, new in zip(found, chose, strict=True) if new) <= 123
