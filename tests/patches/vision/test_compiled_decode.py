"""Compiled decoding beside methods on visual tokens: layers behind a cut hold less, and positions have gaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel.errors import ConfigError
from llm_accel.registry import parse_all
from tests.patches.conftest import Counting
from tests.tiny_vlm import UNEQUAL, Scene, decode, inputs, tiny_vlm

CLOSE = 1e-5
FIRST, LATER, WORDS = Scene((4, 7), 4), Scene((3, 4), 6), Scene((7,), 6)


def shallow(family: str, layers: int) -> PreTrainedModel:
    """Few layers: each of them is traced."""
    model = tiny_vlm(family)
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[:layers]
    return model


def conversation(model: PreTrainedModel, handle: llm_accel.Handle) -> tuple[torch.Tensor, torch.Tensor]:
    """Two turns on one cache, with an image each where the model counts positions without all of them: all tokens, and
    the logits of both answers."""
    cache, ids, logits = handle.new_cache(), torch.zeros(1, 0, dtype=torch.long), []
    grids: dict[str, Any] = {}
    for scene in (FIRST, WORDS if model.config.model_type.startswith("qwen") else LATER):
        batch = inputs(model, [scene])
        ids = torch.cat([ids, batch["input_ids"]], dim=1)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | grids
        if "mm_token_type_ids" in batch:
            grids = {"image_grid_thw": batch["image_grid_thw"]}
            batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        answer, found = decode(model, batch, past_key_values=cache, max_new_tokens=4)
        ids, logits = torch.cat([ids, answer], dim=1), [*logits, found]
    return ids, torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("family", "layers", "methods", "graphs"),
    [
        ("llava", 2, "flowcut:budget=6", 1),
        ("llava", 2, "dyvte:exit=0", 1),
        ("llava", 1, "stride_tokens:budget=3,positions=compact", 1),
        ("llava", 1, "downsample", 1),
        ("internvl", 1, "random_tokens:budget=2", 1),
        ("llava", 2, "snapkv:budget=18,window=4+vhr", 1),
        # transformers gives the positions of a later turn another shape
        ("qwen2_5_vl", 2, "fastv:layer=1,budget=1+h2o:budget=12", 2),
        # a later turn exceeds the budget
        ("llava", 1, "visionzip:budget=6+adakv:budget=12,window=4,page=8", 2),
    ],
)
def test_two_turns_equal_eager(family: str, layers: int, methods: str, graphs: int, counting: Counting) -> None:
    found = []
    for way in ("eager", "compiled"):
        model = shallow(family, layers)
        handle = llm_accel.apply(model, parse_all(methods), decode=way)
        found.append((*conversation(model, handle), handle.report()))
    (tokens, logits, report), (ours, our_logits, said) = found
    assert torch.equal(ours, tokens) and (our_logits - logits).abs().max() <= CLOSE
    assert [one.physical_length for one in said.layers] == [one.physical_length for one in report.layers]
    assert said.backends["decode steps"][0] == "compiled" and said.visual_tokens_after == report.visual_tokens_after
    assert 1 <= counting.graphs <= graphs and not torch._dynamo.utils.counters["graph_break"]


def test_attention_that_is_shifted_decodes_eagerly(counting: Counting) -> None:
    model = shallow("llava", 2)
    for method in ("paint", "var:dims=3"):
        with pytest.raises(ConfigError, match="looks up the entries it has marked"):
            llm_accel.apply(model, method, decode="compiled")
        with llm_accel.apply(model, method, decode="auto") as handle:
            decode(model, inputs(model, UNEQUAL))
            assert handle.report().backends["decode steps"][0] == "eager"
    assert counting.graphs == 0


def test_a_padded_batch_through_three_stages(counting: Counting) -> None:
    """Rows lose different numbers of tokens in the tower, after a layer, and at the end of the prompt."""
    answers = []
    for way in ("eager", "compiled"):
        model = shallow("llava", 2)
        methods = parse_all("flowcut:budget=8+fastv:layer=1,budget=3+snapkv:budget=15,window=4")
        handle = llm_accel.apply(model, methods, decode=way)
        answers.append((*decode(model, inputs(model, UNEQUAL)), [one.evicted for one in handle.report().layers]))
    (tokens, logits, evicted), (ours, our_logits, ours_evicted) = answers
    assert torch.equal(ours, tokens) and (our_logits - logits).abs().max() <= CLOSE and ours_evicted == evicted
    assert counting.graphs == 1
