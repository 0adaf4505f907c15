"""Masked heads: what is silenced, and that nothing else is touched."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import llm_accel
from llm_accel import RetrievalHeads
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.sink_window import sink_window_attention
from tests.contracts import matrix
from tests.contracts.matrix import every_shape, generate
from tests.tiny import FAMILIES, prompt, tiny_model

ALL = tuple(f"{layer}.{head}" for layer in range(3) for head in range(4))
# rounding of chunks of one token comes close to the bar; nothing here chooses between equal tokens
make_batch = partial(matrix.make_batch, make=prompt)
every_family = pytest.mark.parametrize("family", FAMILIES)


def mask(*heads: str, **changes: Any) -> RetrievalHeads:
    return RetrievalHeads(mode="mask", head_list=heads, **changes)


@every_family
def test_no_heads_is_bit_identical(family: str) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    tokens, logits = generate(model, batch)
    with llm_accel.apply(model, RetrievalHeads(mode="mask", k=0)) as handle:
        ours = generate(model, batch)
        assert not handle.report().warnings
    assert torch.equal(ours[0], tokens)
    assert torch.equal(ours[1], logits)


@torch.no_grad()
def test_all_heads_leave_the_bias_of_the_output_projection() -> None:
    model = tiny_model("qwen2")
    outputs = []
    for layer in model.model.layers:
        bias = torch.nn.Parameter(torch.randn(64))
        layer.self_attn.o_proj.bias = bias
        layer.self_attn.register_forward_hook(lambda m, args, output, bias=bias: outputs.append((output[0], bias)))
    with llm_accel.apply(model, mask(*ALL, phase="all")):
        outputs.clear()  # of the trial call
        model(prompt(9))
    assert len(outputs) == 3
    assert all(torch.equal(output, bias.expand_as(output)) for output, bias in outputs)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@every_family
def test_zero_equals_an_output_projection_without_the_head(family: str, cached: bool) -> None:
    model, ids = tiny_model(family), prompt(30)
    dense = model(ids).logits
    with llm_accel.apply(model, mask("1.2", phase="all")):
        ours = model(ids, use_cache=cached).logits
    assert (ours - dense).abs().max() > 1e-3
    weight = model.model.layers[1].self_attn.o_proj.weight
    width = weight.shape[1] // 4
    weight[:, 2 * width : 3 * width] = 0
    assert (ours - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_uniform_equals_a_query_of_zeros(family: str) -> None:
    model, ids = tiny_model(family), prompt(30)
    with llm_accel.apply(model, mask("1.2", mask_mode="uniform", phase="all")):
        ours = model(ids).logits
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight[2 * 16 : 3 * 16] = 0
    if projection.bias is not None:
        projection.bias[2 * 16 : 3 * 16] = 0
    assert (ours - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_masking_a_then_b_is_masking_both() -> None:
    model, ids = tiny_model("llama"), prompt(30)
    with llm_accel.apply(model, mask("0.1", "2.3", phase="all")):
        both = model(ids).logits
    model.model.layers[0].self_attn.o_proj.weight[:, 16:32] = 0
    with llm_accel.apply(model, mask("2.3", phase="all")):
        assert (model(ids).logits - both).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zero", "uniform", "window"])
def test_phase_decode_begins_with_the_last_token_of_the_prompt(mode: str) -> None:
    model, ids = tiny_model("llama"), prompt(30)
    dense = model(ids).logits
    with llm_accel.apply(model, mask("1.0", "2.1", mask_mode=mode, sinks=1, recent=3)):
        ours = model(ids).logits
    assert torch.equal(ours[:, :-1], dense[:, :-1])
    assert not torch.allclose(ours[:, -1], dense[:, -1])


@pytest.mark.parametrize("chunk", [1, 16])
@pytest.mark.parametrize("phase", ["decode", "all"])
@pytest.mark.parametrize("mode", ["zero", "uniform", "window"])
def test_chunked_prefill_is_the_same(mode: str, phase: str, chunk: int) -> None:
    model, batch = tiny_model("gpt_oss"), make_batch("padded", long=True)
    with llm_accel.apply(model, mask("0.1", "1.0", "1.3", mask_mode=mode, phase=phase, sinks=2, recent=6)):
        whole = generate(model, batch)
        chunked = generate(model, batch, prefill_chunk_size=chunk)
    assert torch.equal(whole[0], chunked[0])
    assert (whole[1] - chunked[1]).abs().max() < 1e-5


@every_shape
def test_window_masks_see_what_a_streaming_head_sees(shape: str) -> None:
    """All query heads of a KV head in mode window are a streaming KV head with lambda prefill."""
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    sizes = {"sinks": 3, "recent": 12}
    with llm_accel.apply(model, mask("1.2", "1.3", mask_mode="window", phase="all", **sizes)):
        masked = generate(model, batch)
    kept = ("0.0", "0.1", "1.0", "2.0", "2.1")
    with llm_accel.apply(model, RetrievalHeads(head_list=kept, prefill="lambda", **sizes)):
        streamed = generate(model, batch)
    assert torch.equal(masked[0], streamed[0])
    assert (masked[1] - streamed[1]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (0, 300), (4, 1), (4, 100), (300, 300)])
def test_sink_window_attention_equals_an_explicit_mask(sinks: int, recent: int) -> None:
    torch.manual_seed(1)
    attention = ModelAttention("sdpa", tiny_model("llama").model.layers[0].self_attn, {"scaling": 0.25})
    query, key, value = torch.randn(2, 4, 500, 16), torch.randn(2, 2, 600, 16), torch.randn(2, 2, 600, 16)
    start = torch.tensor([0, 130])
    own, column = torch.arange(100, 600)[:, None], torch.arange(600)
    position = column - start[:, None, None]
    visible = (column <= own) & (position >= 0) & ((position < sinks) | (own - column < recent))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible[:, None], scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    ours = sink_window_attention(attention, query, key, value, start, sinks, recent)
    padding = (own[:, 0] < start[:, None])[..., None, None]
    assert (ours - expected).masked_fill(padding, 0).abs().max() < 1e-5
