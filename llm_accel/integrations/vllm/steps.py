"""Worker side: what a step of the engine means for the requests in it, and the shorter block tables that follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.blocks import Compaction, Policy


@dataclass(frozen=True)
class ObservedRows:
    """Rows of a step whose queries a later cut of their request may look at.

    Attributes:
        name: the request's first block, which is its own while blocks are not shared.
        fresh: whether the request begins here.
        begin, end: its tokens in the step.
    """

    name: int
    fresh: bool
    begin: int
    end: int


@dataclass(frozen=True)
class Move:
    """A request that is cut: what stays of it moves in this step.

    Attributes:
        name: see :class:`ObservedRows`.
        prompt: tokens of the prompt.
        entries: what it has stored, see :class:`~llm_accel.integrations.vllm.blocks.BlockCut`.
        kept: full blocks of them that stay.
        blocks: the blocks that hold them, int64.
    """

    name: int
    prompt: int
    entries: int
    kept: int
    blocks: Tensor


@dataclass
class Step:
    """What the layers have to do in one step, beside attention: move entries, forget the queries seen of requests, by
    their names, and note those of this step."""

    observed: list[ObservedRows] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)


class Requests:
    """The lengths at which prompts of running requests were complete, by the first block of each.

    Args:
        policy: which blocks leave.
        block: tokens per block.
        limit: requests that may run at once; older notes, of requests that ended before their first token, are dropped.
    """

    def __init__(self, policy: Policy, block: int, limit: int) -> None:
        self.policy, self.block, self.limit = policy, block, limit
        self._prompts: OrderedDict[int, int] = OrderedDict()

    def step(
        self, table: Tensor, starts: Sequence[int], lengths: Sequence[int], prefilling: Sequence[bool]
    ) -> tuple[Step, list[tuple[int, int]]]:
        """Notes one step.

        Args:
            table: blocks of each request, int [B, n].
            starts: where the tokens of each request begin in the step, and the end of the last one; B + 1 numbers.
            lengths: tokens of each request when the step is done.
            prefilling: whether its prompt is not complete before the step.

        Returns:
            What the layers do, and for each request the blocks that its tokens do not read: first, last (exclusive).
        """
        found, gaps = Step(), []
        names = table[: len(lengths), 0].tolist()
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            begin, end = starts[row], starts[row + 1]
            computed = length - (end - begin)
            gap = (0, 0)
            if end > begin and prefilling[row]:
                self._prompts.pop(name, None)
                found.observed.append(ObservedRows(name, computed == 0, begin, end))
            elif end > begin:
                gap = self._decoding(found, ObservedRows(name, False, begin, end), computed, table[row])
            gaps.append(gap)
        return found, gaps

    def _decoding(self, found: Step, rows: ObservedRows, computed: int, blocks: Tensor) -> tuple[int, int]:
        name, first = rows.name, rows.name not in self._prompts
        prompt = self._prompts.setdefault(name, computed)
        self._prompts.move_to_end(name)
        if len(self._prompts) > 2 * self.limit:
            self._prompts.popitem(last=False)
        if isinstance(self.policy, Compaction):
            cut, back = self.policy.cut(prompt, computed), self.policy.looks_back(prompt, computed)
            if cut is not None:
                held = blocks[torch.tensor(cut.blocks, device=blocks.device)].long()
                found.moves.append(Move(name, prompt, cut.entries, cut.kept, held))
            if back <= 0 and (first or cut is not None):
                found.forgotten.append(name)
            if back >= 0:
                found.observed.append(rows)
        start, stop = self.policy.gap(prompt, computed)
        return (start, stop) if stop > start else (0, 0)


def shorter(table: Tensor, gaps: Sequence[tuple[int, int]]) -> Tensor:
    """A block table, int [B, n], without the blocks ``first`` to ``last`` of each row; what follows moves up."""
    first, last = torch.tensor(gaps, device=table.device).T[:, :, None]
    column = torch.arange(table.shape[1], device=table.device)[None]
    source = column + (column >= first) * (last - first)
    return table.gather(1, source.clamp(max=table.shape[1] - 1))


class CompressedBuilder:
    """Mixed into a backend's metadata builder."""

    kv_cache_spec: Any
    vllm_config: Any
    supports_update_block_table = False  # it would go past `build`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        policy = getattr(self.kv_cache_spec, "policy", None)
        limit = self.vllm_config.scheduler_config.max_num_seqs
        self._requests = None if policy is None else Requests(policy, self.kv_cache_spec.block_size, limit)
        if policy is not None:
            self._check_layers()

    def _check_layers(self) -> None:
        """Refuses models some of whose layers have no attention, and never asked us."""
        from llm_accel.integrations.vllm.scheduling import NOT_WHOLE, is_whole

        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            spec = layer.get_kv_cache_spec(self.vllm_config) if hasattr(layer, "get_kv_cache_spec") else None
            if spec is not None and not is_whole(spec):
                raise ConfigError(f"{self.kv_cache_spec.method} cannot run in this engine: {NOT_WHOLE}.")

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """A graph of the whole model would be replayed without moving anything."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return type(support).NEVER if hasattr(kv_cache_spec, "policy") else support

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Requests that share a prefix have no common blocks any more."""
        return self._requests is None and super().use_cascade_attention(*args, **kwargs)  # type: ignore[misc]

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The backend's metadata, for shorter tables; what there is to do stands in ``llm_accel_step``."""
        given, requests = common_attn_metadata, self._requests
        if requests is None or given.is_prefilling is None:  # None: a warm-up
            return super().build(common_prefix_len, given, fast_build)  # type: ignore[misc]
        table = given.block_table_tensor
        lengths = given.seq_lens.tolist()
        step, gaps = requests.step(table, given.query_start_loc_cpu.tolist(), lengths, given.is_prefilling.tolist())
        missing = [(last - first) * requests.block for first, last in gaps]
        if any(missing):
            left = torch.tensor(missing, dtype=given.seq_lens.dtype, device=given.seq_lens.device)
            given = replace(
                given,
                seq_lens=given.seq_lens - left,
                block_table_tensor=shorter(table, gaps),
                max_seq_len=max(length - gone for length, gone in zip(lengths, missing, strict=True)),
                **_upper_bounds(given, missing),
            )
        built = super().build(0, given, fast_build)  # type: ignore[misc]
        built.llm_accel_step = step
        return built


def _upper_bounds(given: Any, missing: list[int]) -> dict[str, Tensor]:
    """Lengths that the metadata holds a second time, on the CPU."""
    bound = getattr(given, "seq_lens_cpu_upper_bound", None)
    return {} if bound is None else {"seq_lens_cpu_upper_bound": bound - torch.tensor(missing, dtype=bound.dtype)}
