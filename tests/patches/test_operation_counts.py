"""How many operations a decode step hands to the device: what a GPU waits for when its kernels are short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import llm_accel
from benchmarks.gpu.projection import PLANS
from llm_accel.kernels import (
    block_sparse,
    column_votes,
    compaction,
    dispatch,
    ragged_decode,
    slot_decode,
    slot_write,
)
from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.hip_select import Keys, reference
from llm_accel.patches.cache_name import CACHE
from tests.tiny import prompt, tiny_model

LAYERS, STEPS = 2, 8


def _block_sparse(
    query: Any, key: Any, value: Any, start: Any, scaling: Any, cap: Any, sinks: Any, *fields: Any
) -> Any:
    return block_sparse.OP.backends[-1].run(query, key, value, BlockList(*fields), start, scaling, cap, sinks)


def _on_keys(run: Callable[..., Any]) -> Callable[..., Any]:
    def stand_in(representative: Any, rows: Any, origin: Any, last: Any, *rest: Any) -> Any:
        return run(representative, Keys(rows, origin, last), *rest)

    return stand_in


# what each kernel of ours would give, so that a CPU can walk through the steps of a GPU
STAND_INS: dict[str, Callable[..., Any]] = {
    "block_sparse_attention": _block_sparse,
    "column_votes": column_votes.OP.backends[-1].run,
    "gather_entries": lambda *given: [part for part in compaction.OP.backends[-1].run(*given) if part is not None],
    "hip_enter": reference.enter,
    "hip_keep": reference.keep,
    "hip_level": _on_keys(reference.level),
    "hip_stage_score": _on_keys(reference.score),
    "ragged_attention": ragged_decode.OP.backends[-1].run,
    "slot_decode": slot_decode.OP.backends[-1].run,
    "slot_write": slot_write.OP.backends[-1].run,
}


NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "alias", "detach", "lift_fresh")


def launches(func: Any, args: Any) -> int:
    """Kernels that a GPU would be given for an operation: none for a view or for new memory, one for anything else of
    PyTorch's, and for one of ours those of its plan and of what the plan does to its arguments."""
    if func.namespace == "llm_accel":
        with Operations() as inside:
            _, planned = PLANS[func._opname](*tree_map(_on_meta, args))
        return inside.launches + len(planned)
    written = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    view = bool(written) and not any(alias.is_write for alias in written)
    return 0 if view or func.overloadpacket.__name__ in NOTHING else 1


def _on_meta(given: Any) -> Any:
    if not isinstance(given, torch.Tensor):
        return given
    return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device="meta")


class Operations(TorchDispatchMode):
    """Counts operations, each of ours as one of them, and the launches that they come to on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        self.launches += launches(func, args)
        run = STAND_INS[func._opname] if func.namespace == "llm_accel" else func
        return run(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are chosen as on a GPU."""
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda device: None)
    with Operations():  # the prompt too needs stand-ins
        yield


def steps(method: str, layers: int = LAYERS, length: int = 160, **options: Any) -> list[Operations]:
    """Operations of each decode step after a prompt of ``length`` tokens."""
    model = tiny_model("llama", num_hidden_layers=layers)
    found = []
    with torch.no_grad(), llm_accel.apply(model, method, **options) as handle:
        cache, token = handle.new_cache(), prompt(length, 3)
        for _ in range(STEPS + 1):
            with Operations() as operations:
                token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            found.append(operations)
    return found[1:]


def most_extra(found: list[Operations], dense: Operations) -> float:
    """Operations of a layer beside those of dense decoding."""
    return max(one.counts.total() - dense.counts.total() for one in found) / LAYERS


# per layer, beside those of dense decoding, which takes one more or less by the version of transformers
@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("snapkv", {"budget": 48, "window": 8}, 0),
        ("streaming_llm", {"budget": 48}, 3),
        ("h2o", {"budget": 48}, -2),
        ("adakv", {"budget": 48, "window": 8}, 11),
    ],
)
def test_a_step_takes_few_more_than_dense_decoding(method: str, options: dict[str, Any], most: int) -> None:
    assert most_extra(steps(method, **options), steps("dense")[-1]) <= most


HIP: dict[str, Any] = {"sink": 16, "window": 32, "budget": 32, "min_prefill_len": 0, "refresh": (4, 2)}
HIP |= {"stages": ((32, None, 4), (8, 64, 1)), "edge_layers": ()}


def test_hip_adds_nothing_between_two_choices() -> None:
    dense, found = steps("dense")[-1], steps("hip", **HIP)
    assert all(one.counts["llm_accel::block_sparse_attention"] == LAYERS for one in found)
    chose = [one.counts["llm_accel::hip_stage_score"] > 0 for one in found]
    assert chose[:4] == [True, False, True, False]
    assert most_extra([one for one, new in zip(found, chose, strict=True) if not new], dense) <= 0
    assert most_extra([one for one, new in zip(found, chose, strict=True) if new], dense) <= 32


# Before there were kernels, three layers took 467 operations with H2O and 1097 and more with HiP, counted as here but
# for the two that choose the token; 239 of them were those of dense decoding.
BEFORE = {"h2o": 467, "hip": 1097}
DENSE, CHOOSING = 239, 2
THREE_STAGES = {"stages": ((64, None, 4), (32, 256, 4), (8, 64, 1)), "refresh": (4, 2, 1)}


@pytest.mark.parametrize(("method", "options"), [("h2o", {"budget": 48}), ("hip", HIP), ("hip", HIP | THREE_STAGES)])
def test_half_of_the_operations_before_there_were_kernels(method: str, options: dict[str, Any]) -> None:
    by_version = steps("dense", 3)[-1].counts.total() - CHOOSING - DENSE
    found = steps(method, 3, 500 if method == "hip" else 160, **options)
    assert max(one.counts.total() for one in found) - CHOOSING - by_version <= BEFORE[method] / 2


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("snapkv", {"budget": 48, "window": 8}, 0),
        ("streaming_llm", {"budget": 48}, 2),
        ("h2o", {"budget": 48}, 1),
        ("adakv", {"budget": 48, "window": 8}, 10),
        ("hip", HIP, 23),
        ("hip", HIP | THREE_STAGES, 26),
    ],
)
def test_launches_of_a_layer_beside_those_of_dense_decoding(method: str, options: dict[str, Any], most: int) -> None:
    """What operations of ours launch inside is counted here, conversions of their arguments included."""
    dense = steps("dense")[-1].launches
    found = steps(method, length=500 if method == "hip" else 160, **options)
    assert max(one.launches - dense for one in found) / LAYERS <= most
