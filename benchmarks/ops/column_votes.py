"""Column votes: SnapKV's window, H2O's prefill and decode step, in geometries of known models."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ops.registry import Case, Work
from llm_accel.kernels.column_votes import column_votes

LLAMA_8B, QWEN_7B, GEMMA_9B = (32, 8, 128), (28, 4, 128), (16, 8, 256)


def build(heads: tuple[int, int, int], width: int, slots: int, softcap: float | None, given: bool, device: str) -> Work:
    query_heads, key_heads, dim = heads
    query = torch.randn(1, query_heads, width, dim, dtype=torch.bfloat16, device=device)
    key = torch.randn(1, key_heads, slots, dim, dtype=torch.bfloat16, device=device)
    # the numbers do not matter to the time
    lse = torch.full((1, query_heads, width), 8.0, device=device) if given else None
    rest = {"heads": key_heads, "lse": lse, "scaling": dim**-0.5, "softcap": softcap, "group": "sum"}
    dense = {"is_causal": width == slots, "enable_gqa": True}
    return Work(
        run=lambda: column_votes(query, key, None, **rest),
        baseline=lambda: F.scaled_dot_product_attention(query, key, key, **dense),
    )


def case(
    name: str,
    heads: tuple[int, int, int],
    width: int,
    slots: int,
    softcap: float | None = None,
    given: bool = False,
) -> Case:
    """``given``: attention has left the log-sum-exp of the rows, and keys are read and multiplied once."""
    query_heads, key_heads, dim = heads
    pairs = width * slots - width * (width - 1) // 2
    return Case(
        op="column_votes",
        name=f"{name}{', log-sum-exp given' if given else ''} {query_heads}/{key_heads}/{dim} W={width} S={slots}",
        build=partial(build, heads, width, slots, softcap, given),
        baseline="SDPA of the same queries",
        moved=2 * dim * (query_heads * width + (1 if given else 2) * key_heads * slots) + 4 * key_heads * slots,
        flop=2 * (1 if given else 2) * pairs * dim * query_heads,  # logits are computed in every pass
    )


CASES = [
    *(case("window", LLAMA_8B, 32, slots) for slots in (4096, 32768, 131072)),
    case("window", QWEN_7B, 64, 32768),
    case("window softcap", GEMMA_9B, 32, 8192, softcap=50.0),
    *(case("prefill", LLAMA_8B, slots, slots) for slots in (2048, 8192, 32768)),
    *(case("prefill", LLAMA_8B, slots, slots, given=True) for slots in (8192, 32768)),
    case("prefill softcap", GEMMA_9B, 8192, 8192, softcap=50.0),
    *(case("decode", LLAMA_8B, 1, slots) for slots in (1024, 4096)),
]
