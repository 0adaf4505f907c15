"""HiP with decode="compiled": a graph for each of the few patterns that a step can have, and the choices of eager
decoding."""

from __future__ import annotations

import pytest
import torch

from llm_accel import HiP
from tests.patches.conftest import Counting
from tests.patches.test_compiled_decode import (
    CLOSE,
    check_equal,
    check_steps_wait_for_nothing,
    generate,
    handle_of,
    pair,
)
from tests.tiny import prompt

pytestmark = pytest.mark.usefixtures("counting")
STAGES = "stages=32:None:1+16:96:1+8:64:1,refresh=8+4+2"
SMALL = f"hip:sink=8,window=24,budget=32,{STAGES},block_q=16,edge_layers=,min_prefill_len=0"


def test_compiled_equals_eager_in_one_graph_for_each_pattern(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages choose, the last two, the last one, none."""
    eager, compiled = pair(SMALL)
    for lengths in ([150, 131], [161, 140], [150, 90], [170, 170]):
        check_equal(generate(compiled, lengths), generate(eager, lengths))
        ours, other = (handle_of(model).report().layers[0] for model in (compiled, eager))
        assert ours.sparse_calls == other.sparse_calls >= 9 and ours.physical_length == other.physical_length
    assert counting.graphs == 4 and not torch._dynamo.utils.counters["graph_break"]
    assert handle_of(compiled).report().backends["decode steps"][0] == "compiled"
    check_steps_wait_for_nothing(compiled, counting, monkeypatch)


@pytest.mark.parametrize("selector", ["tree", "exact"])
def test_selectors_without_stages_have_two_patterns(selector: str, counting: Counting) -> None:
    eager, compiled = pair(f"{SMALL},selector={selector}")
    check_equal(generate(compiled, [150, 131]), generate(eager, [150, 131]))
    assert counting.graphs == 2


def test_a_row_that_outgrows_the_budget_begins_to_choose(counting: Counting) -> None:
    """Dense steps are one more pattern; of two layers the one with the larger budget stays dense for longer."""
    method = SMALL.replace("edge_layers=", "edge_layers=0,budget_edge=48")
    eager, compiled = pair(method, layers=2)
    outputs = [generate(model, [56, 41], max_new_tokens=40) for model in (compiled, eager)]
    check_equal(*outputs)
    calls = [[layer.sparse_calls for layer in handle_of(model).report().layers] for model in (compiled, eager)]
    assert calls[0] == calls[1] and 0 < calls[0][0] < calls[0][1]


def test_eager_and_compiled_steps_take_turns(counting: Counting) -> None:
    """A look at a layer brings entries and memory back; a call of several tokens forgets the choices."""
    answers = []
    for model in pair(SMALL):
        cache, logits = handle_of(model).new_cache(), []
        for turn, length in enumerate((150, 7)):
            logits.append(model(prompt(length, seed=turn), past_key_values=cache).logits[:, -1])
            for step in range(7):
                logits.append(model(torch.tensor([[step + 5]]), past_key_values=cache).logits[:, -1])
                if step == 2:
                    assert cache.layers[0].memory.step == step
        answers.append(torch.stack(logits))
    assert (answers[0] - answers[1]).abs().max() <= CLOSE


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_other_families(family: str) -> None:
    eager, compiled = pair(SMALL, family)
    check_equal(generate(compiled, [150, 131], max_new_tokens=4), generate(eager, [150, 131], max_new_tokens=4))


def test_it_composes_with_eviction(counting: Counting) -> None:
    """One graph for every prompt, whose cache has the same size; HiP reads a part of it."""
    eager, compiled = pair(f"snapkv:budget=120,window=8+{SMALL}")
    for lengths in ([150, 131], [300, 260]):
        check_equal(generate(compiled, lengths), generate(eager, lengths))
    assert counting.graphs == 4


def test_the_default_settings_can_be_compiled() -> None:
    assert HiP().fixed_step(0, 32, 1, 8, torch.device("cpu")).begin() == (False, None)
