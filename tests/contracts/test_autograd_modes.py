"""Modes of autograd: a cache goes on in any of them, whichever it was filled in, and gradients are right or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel import Handle
from llm_accel.patches.layers import room
from llm_accel.registry import parse_all
from tests.contracts.laws import EXACT
from tests.patches.conftest import Counting
from tests.tiny import left_padded, prompt, tiny_model

SPLIT = "retrieval_heads:head_list=0.1+1.0+2.0+2.1,sinks=3,recent=12"
HIP = "hip:sink=8,window=17,budget=16,edge_layers=,stages=16:None:2+8:64:1,block_q=16,refresh=4+2,min_prefill_len=0"
METHODS = (
    "snapkv:budget=24,window=8",
    "snapkv:budget=24,window=8,compress=deferred",
    "snapkv:budget=24,window=8,recompress_every=2",
    "pyramidkv:budget=24,window=8,beta=2,kernel=5",
    "adakv:budget=24,window=8,page=8",
    "h2o:budget=24",
    "h2o:budget=24,semantics=sim",
    "streaming_llm:budget=24",
    "streaming_llm:budget=24,positions=cache",
    "random:budget=24,window=8",
    SPLIT,
    SPLIT + ",prefill=chunk",
    SPLIT + ",prefill=lambda",
    SPLIT + ",full_budget=40",
    "retrieval_heads:mode=mask,head_list=0.1+1.3+2.0,sinks=3,recent=12,mask_mode=window",
    "retrieval_heads:mode=mask,head_list=0.1+1.3+2.0,mask_mode=uniform,phase=all",
    HIP,
    "dense:capacity=128",
)
COMPILED = tuple(METHODS[place] for place in (0, 3, 4, 5, 7, 13, 16, 17))
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
# of the prompt, of the steps after it, of the second turn, and of the steps after that
ORDERS = (
    ("inference", "no_grad", "no_grad", "no_grad"),
    ("inference", "grad", "grad", "grad"),
    ("no_grad", "inference", "inference", "inference"),
    ("grad", "inference", "inference", "inference"),
    ("inference", "grad", "inference", "no_grad"),
    ("grad", "inference", "grad", "inference"),
)
every_order = pytest.mark.parametrize("order", ORDERS, ids="-".join)
every_padding = pytest.mark.parametrize("lengths", [(60,), (60, 41)], ids=["single", "padded"])


def talk(model: PreTrainedModel, cache: DynamicCache, lengths: tuple[int, ...], order: tuple[str, ...]) -> list[Tensor]:
    """The last logits of each call of a conversation of two turns on one cache, whose parts run in these modes."""
    ids, mask = left_padded(list(lengths))
    rows, logits = len(lengths), []
    parts = [[ids], prompt(3, 5, rows).split(1, 1), [prompt(9, 6, rows)], prompt(3, 7, rows).split(1, 1)]
    for mode, part in zip(order, parts, strict=True):
        with MODES[mode]():
            for tokens in part:
                seen = cache.get_seq_length() + tokens.shape[1]
                whole = torch.nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
                output = model(tokens.clone(), attention_mask=whole.clone(), past_key_values=cache)
                logits.append(output.logits[:, -1].detach().clone())
    return logits


def same(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return all((one - other).abs().max() <= EXACT for one, other in zip(ours, plain, strict=True))


@every_padding
@every_order
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_goes_on_in_every_mode(method: str, order: tuple[str, ...], lengths: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    with llm_accel.apply(model, parse_all(method) or "dense") as handle:
        plain = talk(model, handle.new_cache(), lengths, ("no_grad",) * 4)
        assert same(talk(model, handle.new_cache(), lengths, order), plain)
