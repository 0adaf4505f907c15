"""Every method on text, in all its ways to store entries and to compute attention."""

from __future__ import annotations

import pytest

SPLIT = "retrieval_heads:head_list=0.1+1.0+2.0+2.1,sinks=3,recent=12"
LAMBDA = SPLIT + ",prefill=lambda"
WINDOW = "retrieval_heads:mode=mask,head_list=0.1+1.3+2.0,sinks=3,recent=12,mask_mode=window"
HIP = "hip:sink=8,window=17,budget=16,edge_layers=,stages=16:None:2+8:64:1,block_q=16,refresh=4+2,min_prefill_len=0"
ADAKV = "adakv:budget=24,window=8,page=8"
# these decode as a graph too
COMPILED = (
    "snapkv:budget=24,window=8",
    "pyramidkv:budget=24,window=8,beta=2,kernel=5",
    ADAKV,
    "h2o:budget=24",
    "streaming_llm:budget=24",
    SPLIT + ",full_budget=40",
    HIP,
    "dense:capacity=128",
)
VARIANTS = (
    *COMPILED,
    "snapkv:budget=24,window=8,compress=deferred",
    "snapkv:budget=24,window=8,recompress_every=2",
    "h2o:budget=24,semantics=sim",
    "streaming_llm:budget=24,positions=cache",
    ADAKV + ",across=model",
    "random:budget=24,window=8",
    SPLIT,
    SPLIT + ",prefill=chunk",
    LAMBDA,
    WINDOW,
    "retrieval_heads:mode=mask,head_list=0.1+1.3+2.0,mask_mode=uniform,phase=all",
)
every_variant = pytest.mark.parametrize("method", VARIANTS)
every_compiled_variant = pytest.mark.parametrize("method", COMPILED)
