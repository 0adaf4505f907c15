"""HiP: each block of queries attends to the sink, its best key blocks and a window (arXiv 2406.09827, 2502.08910)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels import block_sparse, hip_select
from llm_accel.kernels.block_list import BLOCK_K, BLOCK_Q, BlockList
from llm_accel.kernels.dispatch import Problem
from llm_accel.kernels.hip_select import (
    ExactSearch,
    Scope,
    Search,
    Stage,
    StageSearch,
    TreeSearch,
)
from llm_accel.methods.attention import AttentionMethod, AttentionView, FixedStep, Memory
from llm_accel.methods.base import ENTRIES, LAYERS, MethodInfo, option
from llm_accel.methods.shard import WHOLE, HeadShard
from llm_accel.methods.sparse.hip_decode import DecodeMemory, decode_step
from llm_accel.methods.sparse.hip_fixed import FixedMemory

FEW = 8  # queries that are treated as decoding: the proposals of speculative decoding
FEW_BLOCK = 16  # the smallest block of queries
# prompt lengths from which on the default settings beat dense attention: measured on a CPU (benchmarks/hip_cpu.py), an
# estimate from operation counts and published figures on a GPU
BREAK_EVEN = {"cpu": 16384, "cuda": 32768}


@dataclass(frozen=True)
class HiP(AttentionMethod):
    """Prefill and decode read a part of the cache; all of it stays, so that nothing is lost for later queries."""

    sink: int = option("first tokens that every query sees, rounded up to whole blocks", 256, most=ENTRIES, least=0)
    window: int = option("recent tokens that every query sees", 1024, most=ENTRIES)
    budget: int = option(
        "tokens chosen in addition to sink and window, per query block and KV head", 2048, most=ENTRIES
    )
    budget_edge: int | None = option("budget of the edge layers; None: twice the budget", None, most=ENTRIES)
    edge_layers: tuple[int, ...] = option(
        "layers with the edge budget; below 0 counted from the last", (0, 1, 2, -1), most=LAYERS
    )
    dense_layers: tuple[int, ...] = option("layers left dense; below 0 counted from the last", (), most=LAYERS)
    stages: tuple[tuple[int, int | None, int], ...] = option(
        "pruning stages chunk:tokens:stride, coarse to fine: keys of a chunk, keys that enter (None: all), "
        "queries averaged into one",
        ((256, None, 4), (32, 32768, 4), (8, 8192, 1)),
        most=ENTRIES,
    )
    last_stage_exact: bool = option("the last stage reads every key of its chunks instead of bisecting them", True)
    block_q: int = option("queries that share a selection", 64, most=ENTRIES)
    share_heads: Literal["group", "all"] = option("heads that share a selection: those of a KV head, or all", "group")
    share_scores: Literal["fair", "raw"] = option(
        "what queries that share a selection are compared by. fair: how much of its own attention a key gets; raw: the "
        "products, as in the paper",
        "fair",
    )
    refresh: tuple[int, ...] = option("decode steps between two selections of each stage", (16, 8, 4), most=ENTRIES)
    min_prefill_len: int | Literal["auto"] = option(
        "prompts shorter than this are dense; auto: where the default settings break even",
        "auto",
        most=ENTRIES,
        least=0,
    )
    selector: Literal["stages", "tree", "exact"] = option(
        "stages: pruning in stages; tree: halving tree; exact: reads every key, to see what the others miss", "stages"
    )

    name: ClassVar[str] = "hip"
    info: ClassVar[MethodInfo] = MethodInfo(
        "HiP, arXiv 2406.09827; InfiniteHiP, arXiv 2502.08910",
        "keys read by attention, in the prompt and while decoding",
        frees_memory=False,
    )

    def validate(self) -> None:
        self._validate_stages()
        block, most = self.block_k, min((tokens for _, tokens, _ in self.stages if tokens), default=2**62)
        for name in ("budget", "budget_edge"):
            value = getattr(self, name)
            if value is not None and not (0 < value <= most and value % block == 0):
                self.fail(name, f"a multiple of {block}, the last chunk, up to {most}, what enters the last stage")
        if self.block_q not in BLOCK_Q or any(self.block_q % stride for _, _, stride in self.stages):
            self.fail("block_q", f"one of {', '.join(map(str, BLOCK_Q))}, a multiple of every stride in stages")
        nested = all(
            late > 0 and early % late == 0 for early, late in zip(self.refresh, self.refresh[1:], strict=False)
        )
        if len(self.refresh) != len(self.stages) or min(self.refresh) < 1 or not nested:
            self.fail(
                "refresh", f"{len(self.stages)} integers above 0, one for each stage, each dividing the one before"
            )
        if self.window <= max(self.refresh):
            self.fail("window", f"an integer above {max(self.refresh)}, the longest refresh period")

    def _validate_stages(self) -> None:
        chunks = [chunk for chunk, _, _ in self.stages]
        tokens = [entering for _, entering, _ in self.stages]
        powers = all(
            value > 0 and value & (value - 1) == 0 for chunk, _, stride in self.stages for value in (chunk, stride)
        )
        if not self.stages or not powers or sorted(set(chunks), reverse=True) != chunks or chunks[-1] not in BLOCK_K:
            self.fail(
                "stages",
                f"stages (chunk, tokens, stride) with falling chunks, the last one of {', '.join(map(str, BLOCK_K))}; "
                "chunks and strides are powers of two",
            )
        fits = all(
            entering is not None and entering > 0 and entering % chunk == 0 and (before is None or entering <= before)
            for chunk, before, entering in zip(chunks, tokens, tokens[1:], strict=False)
        )
        if tokens[0] is not None or not fits:
            self.fail(
                "stages",
                "tokens None for the first stage, which everything enters; for each later one a multiple of the chunk "
                "of the stage before, and no more than entered that",
            )

    @property
    def block_k(self) -> int:
        """Keys of a chosen block: the last chunk."""
        return self.stages[-1][0]

    def budget_of(self, layer: int, layers: int) -> int:
        """Keys chosen in one layer."""
        if layer not in resolved(self.edge_layers, layers):
            return self.budget
        most = min((tokens for _, tokens, _ in self.stages if tokens), default=2 * self.budget)
        return min(2 * self.budget, most) if self.budget_edge is None else self.budget_edge

    def dense_layer(self, layer: int, layers: int) -> str | None:
        for index in self.dense_layers:
            if not -layers <= index < layers:
                raise ConfigError(
                    f"{self.name}: dense_layers={self.dense_layers} names layer {index}; the model has {layers} layers."
                )
        return "named in dense_layers" if layer in resolved(self.dense_layers, layers) else None

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        selection = ("torch", f"plain torch, selector={self.selector!r} has no kernel")
        return {
            "selection": hip_select.OP.explain(problem) if self.selector == "stages" else selection,
            "sparse": block_sparse.OP.explain(problem),
            "cache": ("whole", "hip reads a part of it and frees no memory"),
        }

    def attend(self, view: AttentionView, memory: Memory | None) -> tuple[Tensor | None, Memory | None]:
        budget = self.budget_of(view.layer, view.layers)
        few = view.queries <= FEW
        search = make_search(self, budget, few, view.scaling, view.heads)
        dense = view.slots <= reach(search)
        least = self.break_even(view.key.device.type)
        blocks: BlockList | None
        with torch.no_grad():
            if view.queries == 1:
                assert memory is None or isinstance(memory, DecodeMemory)
                blocks, memory = decode_step(view.query, view.key, view.start, search, self.periods, dense, memory)
            elif dense or (view.slots < least and not few):
                return None, None
            else:
                blocks, memory = hip_select.hip_select(view.query, view.key, search, view.start), None
                if not few and view.start is not None:
                    blocks = opened(blocks, view.slots - view.start < least)
        if blocks is None:
            return None, memory
        output, _ = block_sparse.block_sparse_attention(
            view.query,
            view.key,
            view.value,
            blocks,
            scaling=view.scaling,
            start=view.start,
            softcap=view.softcap,
            sinks=view.sinks,
        )
        return output, memory

    @property
    def periods(self) -> tuple[int, ...]:
        """Decode steps between two choices of each stage; of a selector without stages, of the whole choice."""
        return self.refresh if self.selector == "stages" else self.refresh[-1:]

    def fixed_step(self, layer: int, layers: int, rows: int, heads: int, device: torch.device) -> FixedStep:
        search = make_search(self, self.budget_of(layer, layers), True)
        return FixedMemory(search, self.periods, reach(search), rows, heads, device)

    def break_even(self, device: str) -> int:
        """Prompt length from which on attention is sparse."""
        if self.min_prefill_len != "auto":
            return self.min_prefill_len
        return BREAK_EVEN.get(device, BREAK_EVEN["cuda"])

    def remember(self, tensors: dict[str, Tensor], values: dict[str, int]) -> Memory:
        return DecodeMemory.of(tensors, values)


@lru_cache(maxsize=64)
def make_search(config: HiP, budget: int, few: bool, scaling: float | None = None, heads: HeadShard = WHOLE) -> Search:
    """The search of a configuration; for a ``few`` queries each of them stands for itself. ``scaling``: softmax scale,
    None for that of the head size."""
    sink = -(-config.sink // config.block_k) * config.block_k
    scope = Scope(sink, config.window, FEW_BLOCK if few else config.block_q, config.block_k)
    how: dict[str, Any] = {
        "share_heads": config.share_heads,
        "across": heads.max,
        "fair": config.share_scores == "fair",
        "scaling": scaling,
    }
    if config.selector == "exact":
        return ExactSearch(scope, budget, **how)
    if config.selector == "tree":
        return TreeSearch(scope, budget, 1 if few else 2, **how)
    stages = tuple(Stage(chunk, tokens, 1 if few else stride) for chunk, tokens, stride in config.stages)
    return StageSearch(scope, budget, stages, config.last_stage_exact, **how)


def reach(search: Search) -> int:
    """Slots that sink, window and budget hold, up to which dense attention gives the same, for less."""
    return search.scope.sink + search.scope.window + search.budget


def resolved(indices: tuple[int, ...], layers: int) -> set[int]:
    """Layer indices counted from 0; those that a model of ``layers`` layers does not have are left out."""
    return {index % layers for index in indices if -layers <= index < layers}


def opened(blocks: BlockList, rows: Tensor) -> BlockList:
    """The lists with everything visible in ``rows``, bool [B], whose prompts are too short to gain from sparsity."""
    whole = rows[:, None, None].to(blocks.idx.device)
    return BlockList(
        blocks.block_q,
        blocks.block_k,
        blocks.ptr,
        blocks.n_full.masked_fill(whole, 0),
        blocks.n_listed.masked_fill(whole, 0),
        blocks.idx,
        blocks.sink,
        blocks.window_start.masked_fill(whole, blocks.sink),
    )
