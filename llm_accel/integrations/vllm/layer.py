"""Worker side: one attention layer, which moves what stays of a completed prompt into the request's first blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.blocks import Compaction, policy_of
from llm_accel.integrations.vllm.checks import current_settings
from llm_accel.integrations.vllm.pages import Pages
from llm_accel.integrations.vllm.steps import Move, ObservedRows, Step
from llm_accel.methods import Depth, HeadShard, PromptView


class CompressedImpl:
    """Mixed into a backend's implementation; idle in engines without a KV method."""

    pages: ClassVar[Pages]
    num_kv_heads: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings, config = current_settings(), get_current_vllm_config()
        self.kv = None if settings is None else settings.kv
        if self.kv is None:
            return
        _check_layer(self)
        self._windows: OrderedDict[int, Tensor] = OrderedDict()  # last queries of prompts that are not complete
        self._limit = 2 * config.scheduler_config.max_num_seqs
        self._layers = config.model_config.hf_text_config.num_hidden_layers
        parallel = config.parallel_config
        self._heads = HeadShard(_tensor_rank(parallel.tensor_parallel_size), parallel.tensor_parallel_size)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The backend's attention; before it, what the step asks for."""
        step: Step | None = getattr(attn_metadata, "llm_accel_step", None)
        if step is not None and self.kv is not None:
            for move in step.moves:
                self._compact(move, kv_cache, extract_layer_index(layer.layer_name))
            for name in step.forgotten:
                self._windows.pop(name, None)
            for rows in step.observed:  # last: a cut looks at the queries before it
                self._observe(rows, query)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)  # type: ignore[misc]

    def _observe(self, rows: ObservedRows, query: Tensor) -> None:
        width = 0 if self.kv is None else getattr(self.kv, "observed_queries", 0)
        if width == 0:
            return
        new = query[max(rows.begin, rows.end - width) : rows.end]
        old = self._windows.pop(rows.name, None)
        if old is not None and not rows.fresh:
            new = torch.cat([old, new])[-width:]
        self._windows[rows.name] = new.clone()
        if len(self._windows) > self._limit:
            self._windows.popitem(last=False)

    def _compact(self, move: Move, kv_cache: Tensor, index: int) -> None:
        """Gathers the entries that stay, per head, and writes them into the request's first blocks."""
        block = kv_cache.shape[2]
        policy = policy_of(self.kv.spec(), block)  # type: ignore[union-attr]
        assert isinstance(policy, Compaction)
        keys, values = (one[:, : move.entries] for one in self.pages.read(kv_cache, move.blocks))
        tail = move.entries % block
        last = torch.arange(move.entries, device=keys.device) >= move.entries - tail
        query = self._windows.get(move.name)
        view = PromptView(
            query=keys.new_zeros(1, 1, 0, keys.shape[-1]) if query is None else query.transpose(0, 1)[None],
            key=keys[None],
            kv_heads=self.num_kv_heads,
            start=None,
            scaling=self.scale,
            softcap=getattr(self, "logits_soft_cap", None) or None,
            sinks=getattr(self, "sinks", None),
            layer=index,
            layers=self._layers,
            protected=last[None] if tail else None,
            depth=Depth(index, self._layers),
            heads=self._heads,
        )
        kept = policy.rounded(move.prompt).select(view)[0, :, : move.kept * block, None]
        kept = kept.expand(-1, -1, keys.shape[-1])
        self.pages.write(kv_cache, move.blocks[: move.kept], keys.gather(1, kept), values.gather(1, kept))


def _check_layer(impl: Any) -> None:
    """Refuses layers whose entries cannot move.

    Raises:
        ConfigError: the message says why.
    """
    wrong = {
        "layers that read the entries of others would find them moved": impl.kv_sharing_target_layer_name is not None,
        "ALiBi counts distances in the cache": getattr(impl, "alibi_slopes", None) is not None,
    }
    reason = next((reason for reason, holds in wrong.items() if holds), None)
    if reason is not None:
        raise ConfigError(f"{impl.kv.spec()} cannot run in this engine: {reason}.")


def _tensor_rank(count: int) -> int:
    if count == 1:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
