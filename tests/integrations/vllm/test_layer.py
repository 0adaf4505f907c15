"""One layer's move on tensors, for the pages of every backend that KV methods know: those of FlashAttention and Triton
cannot run here. Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F

from llm_accel.integrations.vllm.blocks import policy_of
from llm_accel.integrations.vllm.pages import SplitPages, VecPages
from llm_accel.integrations.vllm.steps import Move, ObservedRows
from llm_accel.methods import HeadShard, PromptView
from llm_accel.registry import parse

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
BLOCK, HEADS, GROUP, DIM, PROMPT = 16, 2, 3, 8, 139
BLOCKS = torch.tensor([7, 2, 9, 4, 11, 1, 5, 8, 3])


def layer(pages, method):
    from llm_accel.integrations.vllm.layer import CompressedImpl

    made = CompressedImpl.__new__(CompressedImpl)
    made.pages, made.kv, made.num_kv_heads, made.scale = pages, parse(method), HEADS, 0.3
    made._windows, made._limit, made._layers, made._heads = OrderedDict(), 8, 4, HeadShard()
    return made


def storage(kind: str) -> torch.Tensor:
    """Pages [12, heads, block, 2 * D], in the order of memory that a backend may have."""
    if kind == "heads first":
        return torch.zeros(12, HEADS, BLOCK, 2 * DIM)
    return torch.zeros(12, BLOCK, HEADS, 2 * DIM).transpose(1, 2)


@pytest.mark.parametrize("method", ["snapkv:budget=60,window=20", "random:budget=60,window=4"])
@pytest.mark.parametrize(
    ("pages", "kind"), [(VecPages(), "heads first"), (SplitPages(), "heads first"), (SplitPages(), "tokens first")]
)
def test_what_stays_is_what_the_method_chose_and_attention_over_fewer_blocks_sees_it(pages, kind, method):
    torch.manual_seed(0)
    cache = storage(kind)
    room = torch.zeros(HEADS, len(BLOCKS) * BLOCK, DIM)
    keys, values = torch.randn_like(room), torch.randn_like(room)
    pages.write(cache, BLOCKS, keys, values)
    query = torch.randn(PROMPT, HEADS * GROUP, DIM)
    made = layer(pages, method)
    for begin in range(0, PROMPT, 50):  # the window comes from several chunks
        chunk = query[begin : begin + 50]
        made._observe(ObservedRows(7, begin == 0, 0, len(chunk)), chunk)
    made._compact(Move(7, PROMPT, PROMPT, policy_of(method, BLOCK).kept(PROMPT), BLOCKS), cache, index=2)

    policy = policy_of(method, BLOCK)
    rounded, stay, tail = policy.rounded(PROMPT), policy.kept(PROMPT), PROMPT % BLOCK
    last = torch.arange(PROMPT) >= PROMPT - tail
    width = rounded.observed_queries
    view = PromptView(
        query[PROMPT - width :].transpose(0, 1)[None], keys[None, :, :PROMPT], HEADS,
        scaling=0.3, layer=2, layers=4, protected=last[None],
    )  # fmt: skip
    kept = rounded.select(view)[0]
    first, full = policy.gap(PROMPT, PROMPT)
    table = torch.cat([BLOCKS[:first], BLOCKS[full:]])
    found_keys, found_values = (one[:, : stay * BLOCK + tail] for one in pages.read(cache, table))
    for head in range(HEADS):
        assert torch.equal(found_keys[head], keys[head, kept[head]])
        assert torch.equal(found_values[head], values[head, kept[head]])
    new = torch.randn(HEADS, 1, DIM)
    hidden = torch.zeros(HEADS, PROMPT, dtype=torch.bool).scatter(1, kept, True)[:, None]
    dense = F.scaled_dot_product_attention(new, keys[:, :PROMPT], values[:, :PROMPT], attn_mask=hidden)
    torch.testing.assert_close(F.scaled_dot_product_attention(new, found_keys, found_values), dense)


def test_a_request_that_ends_early_leaves_no_window_for_the_next_one():
    made = layer(SplitPages(), "snapkv:budget=60,window=20")
    for name in range(30):
        made._observe(ObservedRows(name, True, 0, 25), torch.randn(25, HEADS * GROUP, DIM))
    assert len(made._windows) == made._limit
    later = torch.randn(5, HEADS * GROUP, DIM)
    made._observe(ObservedRows(29, True, 0, 5), later)  # another request in the same block
    assert torch.equal(made._windows[29], later)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_are_those_that_vllm_writes(dtype):
    """The CPU's own operation fills the pages, in each dtype of its "vec" kernels."""
    from vllm import _custom_ops as ops

    block, dim = 32, 32
    cache = torch.zeros(12, HEADS, block, 2 * dim, dtype=dtype)
    keys, values = (torch.randn(50, HEADS, dim).to(dtype) for _ in range(2))
    slots = torch.cat([torch.arange(block) + 7 * block, torch.arange(18) + 2 * block])
    stored = cache.view(12, HEADS, 2 * block, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *stored, slots, "vec", k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )  # fmt: skip
    found = VecPages().read(cache, torch.tensor([7, 2]))
    assert torch.equal(found[0][:, :50], keys.transpose(0, 1))
    assert torch.equal(found[1][:, :50], values.transpose(0, 1))
