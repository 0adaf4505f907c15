"""Scheduler side: the spec of layers whose requests let blocks go, and the manager that frees them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.integrations.vllm.blocks import Policy, policy_of
from llm_accel.integrations.vllm.counters import counters
from llm_accel.integrations.vllm.counts import Labels

logger = logging.getLogger("vllm.llm_accel")
_LOGGED_EVERY = 1000


NOT_WHOLE = (
    "some of its layers have a window, chunks or a state in place of a full cache, and which blocks those need is not "
    "known here"
)


def is_whole(spec: Any) -> bool:
    """Whether a layer reads all entries of a request."""
    full = isinstance(spec, FullAttentionSpec) and type(spec) in (FullAttentionSpec, CompressedSpec)
    return full and spec.sliding_window is None and spec.attention_chunk_size is None


@dataclass(frozen=True)
class EngineFacts:
    """The engine to which a layer belongs, for what it counts.

    Attributes:
        index: its data-parallel index.
        model: the name under which it is served.
        copies: how often a block is held: in each layer, by each worker.
    """

    index: int = 0
    model: str = ""
    copies: int = 1


SINGLE = EngineFacts()


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """Full attention over fewer blocks.

    Attributes:
        method: the KV method, in its text form.
        engine: whose layer it is.
    """

    method: str
    engine: EngineFacts = SINGLE

    @classmethod
    def of(cls, spec: FullAttentionSpec, method: str, engine: EngineFacts = SINGLE) -> CompressedSpec:
        """The spec of a layer with a method."""
        given = {one.name: getattr(spec, one.name) for one in fields(FullAttentionSpec) if one.init}
        return cls(**given, method=method, engine=engine)

    @property
    def policy(self) -> Policy:
        """Which blocks leave."""
        return policy_of(self.method, self.block_size)

    @property
    def prefix_cacheable(self) -> bool:
        """No other request may find a block that was written to again: it holds other tokens then."""
        return not self.policy.rewrites

    @classmethod
    def merge(cls, specs: list[Any]) -> CompressedSpec:
        if any(type(one) is not cls or one.method != specs[0].method for one in specs):
            raise ConfigError(f"{cls.__name__}: layers that share block tables must have the same method.")
        return cls.of(FullAttentionSpec.merge(specs), specs[0].method, specs[0].engine)


class CompressedManager(FullAttentionManager):
    """Frees the blocks that no later step reads.

    Worker and scheduler must agree on the number of tokens after which a prompt was complete. The worker sees how many
    are computed when a step begins; here that is what the step before was given place for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begins: dict[str, int] = {}  # tokens computed when the next step of a request begins
        self._prompts: dict[str, int] = {}
        self.freed = 0
        engine = self.kv_cache_spec.engine
        self._counters = counters(Labels(engine.model, str(engine.index), self.kv_cache_spec.method))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        self._begins[request_id] = num_tokens
        self._counters.run(len(self._begins))
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Not every vLLM asks the spec where all layers are of one kind, and would hand out what was written to."""
        if self.kv_cache_spec.prefix_cacheable:
            super().cache_blocks(*args, **kwargs)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        begins = self._begins.get(request_id, processed_computed_tokens)
        if num_prompt_tokens is None or begins < num_prompt_tokens:
            if request_id in self._prompts:
                raise UnsupportedCallError(
                    f"{self.kv_cache_spec.method}: request {request_id} goes on with more input after its prompt was "
                    "compressed, as streamed input does; send it as a new request, or serve without a KV method."
                )
            return
        prompt = self._prompts.setdefault(request_id, begins)
        first, last = self.kv_cache_spec.policy.freed(prompt, processed_computed_tokens)
        if last <= first:
            return
        before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, first, last)
        self._count(self.block_pool.get_num_free_blocks() - before)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        self._begins.pop(request_id, None)
        self._prompts.pop(request_id, None)
        self._counters.run(len(self._begins))
        return super().pop_blocks_for_free(request_id)

    def _count(self, freed: int) -> None:
        page = self.kv_cache_spec.page_size_bytes
        if freed:
            self._counters.add(freed, page * self.kv_cache_spec.engine.copies)
        step = self.freed // _LOGGED_EVERY
        self.freed += freed
        if self.freed // _LOGGED_EVERY > step:
            logger.info(
                "llm_accel: %s has freed %d blocks early, %.2f MiB each in every layer; %d requests run, %d of %d "
                "blocks are free",
                self.kv_cache_spec.method,
                self.freed,
                page / 2**20,
                len(self._begins),
                self.block_pool.get_num_free_blocks(),
                self.block_pool.num_gpu_blocks,
            )
