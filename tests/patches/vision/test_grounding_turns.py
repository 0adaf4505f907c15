"""FlowCut, SnapKV and methods against hallucination together: two turns of a batch, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llm_accel
from llm_accel import VHR, FlowCut, SnapKV
from llm_accel.methods import MethodConfig
from llm_accel.report import Report
from tests.grounding_oracle import logits_of
from tests.patches.vision.test_grounding import (
    EXACT,
    STEPS,
    VHR_ON,
    Entering,
    dialogue_of,
    spoken,
)
from tests.tiny_vlm import IMAGE, UNEQUAL, inputs, tiny_vlm


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize(
    "methods",
    [[FlowCut(), SnapKV(), VHR()], [FlowCut(ratio=0.6), SnapKV(budget=12, window=4), VHR_ON]],
    ids=["defaults", "evicting"],
)
def test_two_turns_of_a_batch_with_flowcut_and_snapkv(family: str, methods: list[MethodConfig]) -> None:
    """As a user writes it, by name, and with budgets that these prompts exceed: a left-padded batch whose rows have one
    image and two, and a second question on the same cache. Every logit of both turns equals the oracle's."""
    model = tiny_vlm(family)
    batch = inputs(model, UNEQUAL)
    prompt = batch["input_ids"].shape[1]
    question = torch.randint(3, IMAGE, (2, 7), generator=torch.Generator().manual_seed(9))
    given = methods if methods[1].budget == 12 else [method.name for method in methods]
    with llm_accel.apply(model, given, trace=True) as handle:
        entering, cache = Entering(model), handle.new_cache()
        first = spoken(model, batch, past_key_values=cache)
        before = handle.report()
        history = torch.cat([first.sequences, question], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, STEPS + 7, dtype=torch.long)], dim=1)
        second = spoken(model, {"input_ids": history, "attention_mask": mask}, past_key_values=cache)
        entering.hook.remove()
        after = handle.report()
    assert after.visual_tokens_after < after.visual_tokens_before and len(entering.calls) == 2
    assert [layer.grounding for layer in after.layers] == [layer.grounding for layer in before.layers]
    entered = entering.calls[0]["rows"].shape[1] + STEPS - 1
    assert before.layers[0].physical_length == (12 + STEPS - 1 if given is methods else entered)
    two_stages = family == "qwen2_5_vl" and given is not methods  # the released form for Qwen
    assert after.exit_layer == (1 if two_stages else None)
    for row in range(2):
        replies = [first.sequences[row, prompt:], second.sequences[row, history.shape[1] :]]
        dialogue = dialogue_of(model, entering.calls, replies, row)
        index = entering.calls[0]["index"][row]
        index = index[index >= 0]
        padding = int((batch["attention_mask"][row] == 0).sum())
        total = len(dialogue.visual)
        places = torch.cat([index - padding, torch.arange(total - len(index)) + prompt - padding])
        ends = len(index), total - STEPS + 1
        dialogue.hidden = hidden_in_turns((before, after), ends, places, row)
        for layer, gone in dialogue.hidden.items():
            if two_stages and layer > 1:  # what SnapKV has left alone, but FlowCut's second stage has not
                gone[:] |= gone[:, ends[0], None]
        wanted = logits_of(model, dialogue, methods, len(index))[dialogue.last]
        got = torch.stack([*first.logits, *second.logits], 1)[row].double()
        assert torch.allclose(got, wanted, atol=EXACT), float((got - wanted).abs().max())


def hidden_in_turns(
    reports: tuple[Report, Report], ends: tuple[int, int], places: Tensor, row: int
) -> dict[int, Tensor]:
    """What queries behind the end of each turn's prompt no longer find, of what stood before it. ``places``: the
    position of each token of the dialogue, int64 [T]."""
    found, total = {}, len(places)
    for layer, (early, late) in enumerate(zip(*(report.layers for report in reports), strict=True)):
        if not early.evicted:
            continue
        gone = torch.zeros(early.kept.shape[1], total, total, dtype=torch.bool)
        for head in range(len(gone)):
            for told, begin, end in ((early, ends[0], ends[1]), (late, ends[1], total)):
                kept = torch.tensor(sorted(set(told.kept[row, head].tolist())))
                gone[head, begin:end, :begin] = ~torch.isin(places[:begin], kept)
        # what was said and asked after the first prompt is there for all queries of the second one
        gone[:, ends[0] : ends[1], ends[0] : ends[1]] = False
        found[layer] = gone
    return found
