"""The configurations of every Triton kernel that is compiled ahead of time: plans on meta tensors, by their label."""

from __future__ import annotations

import torch

from llm_accel.kernels.block_list import BlockList
from llm_accel.kernels.block_sparse.launch import plan as plan_block_sparse
from llm_accel.kernels.column_votes.launch import plan as plan_column_votes
from llm_accel.kernels.compaction.launch import plan as plan_compaction
from llm_accel.kernels.hip_select.candidates import Keys
from llm_accel.kernels.hip_select.launch import plan as plan_hip_select
from llm_accel.kernels.hip_select.launch import plan_enter, plan_keep, plan_level
from llm_accel.kernels.launch import Launch, ceil_div
from llm_accel.kernels.ragged_decode.launch import plan as plan_ragged_decode
from llm_accel.kernels.slot_decode.launch import plan as plan_slot_decode
from llm_accel.kernels.slot_write.launch import plan as plan_slot_write


def block_sparse() -> dict[str, list[Launch]]:
    plans = {}
    for dtype, dims in ((torch.bfloat16, (64, 80, 96, 128, 256)), (torch.float32, (64, 128, 256))):
        for dim in dims:
            name = f"{str(dtype).removeprefix('torch.')} head_dim {dim}"
            for block_q, block_k in ((64, 8), (64, 64), (128, 128)):
                plans[f"{name} block {block_q}x{block_k}"] = _block_sparse(dtype, dim, block_q, block_k)
            plans[f"{name} one query"] = _block_sparse(dtype, dim, 16, 8, queries=1)
    plans["bfloat16 head_dim 128 one query everything"] = _block_sparse(torch.bfloat16, 128, 16, 8, True, queries=1)
    plans["bfloat16 head_dim 64 everything"] = _block_sparse(torch.bfloat16, 64, 64, 8, everything=True)
    plans["bfloat16 head_dim 256 everything"] = _block_sparse(torch.bfloat16, 256, 64, 8, everything=True)
    return plans


def _block_sparse(
    dtype: torch.dtype,
    dim: int,
    block_q: int,
    block_k: int,
    everything: bool = False,
    queries: int = 4096,
    slots: int = 4096,
) -> list[Launch]:
    """Grouped-query attention, 4 query heads per KV head; ``everything``: padding, sinks, soft cap and window."""
    query = torch.empty(2, 16, queries, dim, dtype=dtype, device="meta")
    key = torch.empty(2, 4, slots, dim, dtype=dtype, device="meta")
    shape = (2, 4, ceil_div(queries, block_q))
    counts = torch.empty(shape, dtype=torch.int32, device="meta")
    blocks = BlockList(
        block_q,
        block_k,
        counts.long(),
        counts,
        counts,
        torch.empty(2**16, dtype=torch.int32, device="meta"),
        256,
        counts,
        1024 if everything else None,
    )
    start = torch.empty(2, dtype=torch.int64, device="meta") if everything else None
    sinks = torch.empty(16, dtype=dtype, device="meta") if everything else None
    return plan_block_sparse(query, key, key, start, 0.1, 30.0 if everything else None, sinks, *vars(blocks).values())[
        1
    ]


def column_votes() -> dict[str, list[Launch]]:
    return {
        **{f"prefill {dim} bf16": _column_votes(dim, "bf16") for dim in (64, 80, 96, 128, 256)},
        **{f"prefill {dim} fp32": _column_votes(dim, "fp32") for dim in (64, 80, 128, 256)},
        "prefill 128 fp16": _column_votes(128, "fp16"),
        "prefill 256 bf16 softcap padded": _column_votes(256, "bf16", softcap=50.0, padded=True),
        "prefill 64 bf16 sinks": _column_votes(64, "bf16", sinks=True, group=8),
        "prefill 128 bf16 group 7": _column_votes(128, "bf16", group=7),
        "window 128 bf16 max": _column_votes(128, "bf16", width=32, reduce="max"),
        "window 128 bf16 rounded": _column_votes(128, "bf16", width=32, round_to=torch.bfloat16),
        "latents 192 bf16": _column_votes(192, "bf16", group=1, heads=1),
        "decode 128 bf16": _column_votes(128, "bf16", width=1, reduce="sum"),
    }


def _column_votes(
    dim: int,
    dtype: str,
    width: int = 4096,
    group: int = 4,
    heads: int = 8,
    reduce: str = "mean",
    softcap: float | None = None,
    padded: bool = False,
    sinks: bool = False,
    round_to: torch.dtype | None = None,
    slots: int = 4096,
) -> list[Launch]:
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    with torch.device("meta"):
        query, key = torch.empty(1, 8 * group, width, dim, dtype=kind), torch.empty(1, 8, slots, dim, dtype=kind)
        start = torch.empty(1, dtype=torch.int64) if padded else None
        learned = torch.empty(8 * group, dtype=kind) if sinks else None
    return plan_column_votes(query, key, start, heads, dim**-0.5, softcap, learned, reduce, round_to)[1]


def compaction() -> dict[str, list[Launch]]:
    return {
        **{f"{dim} 16-bit": _compaction(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        "128 16-bit with scores": _compaction(128, torch.bfloat16, scored=True),
        "128 32-bit": _compaction(128, torch.float32),
        "256 32-bit with scores": _compaction(256, torch.float32, scored=True),
        "128 8-bit": _compaction(128, torch.float8_e4m3fn),
    }


def _compaction(dim: int, dtype: torch.dtype, scored: bool = False, kept: int = 1024) -> list[Launch]:
    with torch.device("meta"):
        entries = torch.empty(1, 8, 4096, dim, dtype=dtype)
        indices = torch.empty(1, 8, kept, dtype=torch.int64)
        scores = torch.empty(1, 8, 4096) if scored else None
    return plan_compaction(indices, entries, entries, scores)[1]


HIP_STAGES = ((256, 64, False), (32, 64, False), (8, 256, True), (8, 4, True), (8, 1, True))  # chunk, queries, exact


def hip_select() -> dict[str, list[Launch]]:
    plans = {}
    for dtype, dims in ((torch.bfloat16, (64, 80, 96, 128, 256)), (torch.float32, (64, 128, 256))):
        for dim in dims:
            for chunk, queries, exact in HIP_STAGES:
                label = f"{str(dtype).removeprefix('torch.')} head_dim {dim} chunk {chunk} queries {queries}"
                plans[label] = _hip_select(dtype, dim, chunk, queries, exact)
            for queries in (64, 4):
                label = f"{str(dtype).removeprefix('torch.')} head_dim {dim} levels of {queries} queries"
                plans[label] = _hip_level(dtype, dim, queries)
    return plans | {
        "all chunks enter": _hip_enter(None),
        "parts of chunks enter": _hip_enter(32),
        "what is new enters too": _hip_enter(32, moved=16),
        **{f"the best of {chunks} chunks": _hip_keep(chunks) for chunks in (256, 1024, 4096)},
    }


def _hip_level(dtype: torch.dtype, dim: int, queries: int) -> list[Launch]:
    keys = Keys.of(torch.empty(2, 4, 4096, dim, dtype=dtype, device="meta"), None)
    representative = torch.empty(2, 4, 64, queries, dim, dtype=dtype, device="meta")
    end = torch.empty(1, 1, 64, 1, dtype=torch.int64, device="meta")
    return plan_level(representative, keys.rows, keys.origin, keys.last, end, dim**-0.5)[1]


def _hip_enter(chunk: int | None, moved: int = 0, slots: int = 4096) -> list[Launch]:
    kept = None if chunk is None else torch.empty(2, 4, 1, slots // 32, dtype=torch.int64, device="meta")
    end = torch.empty(1, 1, 1, 1, dtype=torch.int64, device="meta")
    return plan_enter(kept, end if moved else None, end, chunk or 8, 8, 256, moved if chunk else slots // 8)[1]


def _hip_keep(chunks: int) -> list[Launch]:
    score, starts = (torch.empty(2, 4, 64, chunks, dtype=kind, device="meta") for kind in (torch.float32, torch.int64))
    return plan_keep(score, starts, chunks // 4)[1]


def _hip_select(dtype: torch.dtype, dim: int, chunk: int, queries: int, exact: bool) -> list[Launch]:
    """Two rows of 4 key heads."""
    keys = Keys.of(torch.empty(2, 4, 4096, dim, dtype=dtype, device="meta"), None)
    starts = torch.empty(2, 4, 64, 128, dtype=torch.int64, device="meta")
    representative = torch.empty(2, 4, 64, queries, dim, device="meta")
    end = torch.empty(1, 1, 64, 1, dtype=torch.int64, device="meta")
    level = torch.empty(2, 4, 64, queries, device="meta") if queries > 1 else None
    return plan_hip_select(representative, keys.rows, keys.origin, keys.last, starts, end, chunk, exact, level)[1]


def ragged_decode() -> dict[str, list[Launch]]:
    return {
        **{f"decode {dim} bf16": _ragged_decode(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        **{f"decode {dim} fp32": _ragged_decode(dim, torch.float32) for dim in (64, 80, 128, 256)},
        "decode 128 fp16": _ragged_decode(128, torch.float16),
        "decode 128 bf16 short": _ragged_decode(128, torch.bfloat16, pages=4),
        "decode 256 bf16 softcap": _ragged_decode(256, torch.bfloat16, softcap=50.0),
        "decode 64 bf16 pages of 8": _ragged_decode(64, torch.bfloat16, pages=512, page=8),
        "decode 128 bf16 pages of 8": _ragged_decode(128, torch.bfloat16, pages=512, page=8),
        "decode 128 bf16 pages of 32": _ragged_decode(128, torch.bfloat16, page=32),
        "decode 64 bf16 sinks": _ragged_decode(64, torch.bfloat16, sinks=True, group=8),
        "8 tokens 128 bf16 group 7": _ragged_decode(128, torch.bfloat16, count=8, group=7),
        "8 tokens 256 bf16 group 16": _ragged_decode(256, torch.bfloat16, count=8, group=16),
    }


def _ragged_decode(
    dim: int,
    dtype: torch.dtype,
    count: int = 1,
    group: int = 4,
    pages: int = 128,
    page: int = 64,
    softcap: float | None = None,
    sinks: bool = False,
) -> list[Launch]:
    with torch.device("meta"):
        query, pool = torch.empty(1, 8 * group, count, dim, dtype=dtype), torch.empty(8 * pages, page, dim, dtype=dtype)
        table = torch.empty(1, 8, pages, dtype=torch.int64)
        lengths = torch.empty(1, 8, dtype=torch.int64)
        learned = torch.empty(8 * group, dtype=dtype) if sinks else None
    return plan_ragged_decode(query, pool, pool, table, lengths, dim**-0.5, softcap, learned)[1]


def slot_decode() -> dict[str, list[Launch]]:
    return {
        **{f"decode {dim} bf16": _slot_decode(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        **{f"decode {dim} fp32": _slot_decode(dim, torch.float32) for dim in (64, 128, 256)},
        "decode 128 fp16": _slot_decode(128, torch.float16),
        "decode 128 bf16 mean": _slot_decode(128, torch.bfloat16, per_query=True),
        "decode 256 bf16 softcap padded": _slot_decode(256, torch.bfloat16, softcap=50.0, padded=True),
        "decode 64 bf16 sinks group 8": _slot_decode(64, torch.bfloat16, sinks=True, group=8),
        "decode 128 bf16 group 7": _slot_decode(128, torch.bfloat16, group=7),
        "decode 192 bf16 latents": _slot_decode(192, torch.bfloat16, kv_heads=16, group=1, heads=1),
    }


def _slot_decode(
    dim: int,
    dtype: torch.dtype,
    kv_heads: int = 8,
    group: int = 4,
    heads: int | None = None,
    slots: int = 4097,
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
    per_query: bool = False,
) -> list[Launch]:
    with torch.device("meta"):
        query = torch.empty(1, kv_heads * group, 1, dim, dtype=dtype)
        key = torch.empty(1, kv_heads, slots, dim, dtype=dtype)
        scores = torch.empty(1, heads or kv_heads, slots)
        positions = torch.empty(scores.shape, dtype=torch.int64)
        start = torch.empty(1, dtype=torch.int64) if padded else None
        learned = torch.empty(kv_heads * group, dtype=dtype) if sinks else None
    rest = (dim**-0.5, softcap, learned, 1.0, 4, 2048, per_query)
    return plan_slot_decode(query, key, key, scores, positions, start, *rest)[1]


def slot_write() -> dict[str, list[Launch]]:
    return {
        **{f"{dim} 16-bit": _slot_write(dim, torch.bfloat16) for dim in (64, 80, 96, 128, 256)},
        "128 32-bit": _slot_write(128, torch.float32),
        "128 16-bit without scores": _slot_write(128, torch.bfloat16, scored=False),
    }


def _slot_write(dim: int, dtype: torch.dtype, scored: bool = True, slots: int = 4097) -> list[Launch]:
    with torch.device("meta"):
        entries, new = torch.empty(1, 8, slots, dim, dtype=dtype), torch.empty(1, 8, 1, dim, dtype=dtype)
        spare, positions = torch.empty(1, 8, dtype=torch.int64), torch.empty(1, 8, slots, dtype=torch.int64)
        scores = torch.empty(1, 8, slots) if scored else None
    return plan_slot_write(entries, entries, new, new, spare, positions, scores)[1]


CONFIGURATIONS = {
    "block_sparse_attention": block_sparse,
    "column_votes": column_votes,
    "gather_entries": compaction,
    "hip_select": hip_select,
    "ragged_attention": ragged_decode,
    "slot_decode": slot_decode,
    "slot_write": slot_write,
}
