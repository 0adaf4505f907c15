"""How many blocks of a request stay: arithmetic that scheduler and worker do alike, so that nothing travels between.

A block holds ``block`` tokens of all layers. Keys carry their positions, so the entries of a decoding request may lie
in any order, and each layer and head may hold other tokens, as long as all hold equally many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from llm_accel.errors import ConfigError
from llm_accel.methods import PromptCompression, StreamingLLM
from llm_accel.registry import parse


@dataclass(frozen=True)
class Compaction:
    """The kept entries of the full blocks of the prompt move into its first blocks, once, in the step that decodes the
    first token; the blocks behind them leave. The last block, partly filled, stays where it is: what it holds is kept
    by force, and so the budget is rounded down by less than a block."""

    method: PromptCompression
    block: int

    def __post_init__(self) -> None:
        method, least = self.method, self.method.least + self.block
        if method.ratio is None and method.entries(2**62) < least:
            raise ConfigError(
                f"{method.spec()}: vLLM frees whole blocks of {self.block} tokens, so a budget here is at least "
                f"{least} ({method.reserved_for}; up to {self.block - 1} stand in the last block). Raise the "
                "budget, or lower vLLM's block_size."
            )

    rewrites = True

    def kept(self, prompt: int) -> int:
        """Full blocks that hold what stays of a prompt of so many tokens."""
        full, tail = divmod(prompt, self.block)
        least = -(-(self.method.least - tail) // self.block)
        return min(full, max(1, least, (self.method.entries(prompt) - tail) // self.block))

    def gap(self, prompt: int, computed: int) -> tuple[int, int]:
        """First and last (exclusive) block of a request that a token behind ``computed`` ones does not read."""
        return self.kept(prompt), prompt // self.block

    def rounded(self, prompt: int) -> PromptCompression:
        """The method with the budget that whole blocks amount to."""
        budget = self.kept(prompt) * self.block + prompt % self.block
        return replace(self.method, budget=budget, ratio=None)


@dataclass(frozen=True)
class Streaming:
    """Sinks and recent entries by whole blocks; the blocks between them leave while decoding goes on. No block is ever
    written to again, so other requests may find those of the prompt by its prefix.

    The newest block is partly filled; with it, ``sink_blocks`` and ``recent_blocks`` full ones never pass the budget.
    """

    method: StreamingLLM
    block: int

    def __post_init__(self) -> None:
        method, least = self.method, (self.sink_blocks + 2) * self.block
        if method.ratio is not None:
            raise ConfigError(
                f"{method.spec()}: a ratio of the prompt would have to be remembered by scheduler and worker for a "
                "window that moves; give budget."
            )
        if method.entries(2**62) < least:
            raise ConfigError(
                f"{method.spec()}: vLLM frees whole blocks of {self.block} tokens, so a budget here is at least "
                f"{least}: {self.sink_blocks} of sinks, one of recent tokens, and the one that is being filled."
            )

    rewrites = False

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sinks."""
        return -(-self.method.sinks // self.block)

    @property
    def recent_blocks(self) -> int:
        """Full blocks read before the one that is being filled."""
        return self.method.entries(2**62) // self.block - self.sink_blocks - 1

    def gap(self, prompt: int, computed: int) -> tuple[int, int]:
        """As :meth:`Compaction.gap`; the prompt makes no difference."""
        return self.sink_blocks, max(self.sink_blocks, computed // self.block - self.recent_blocks)


Policy = Compaction | Streaming


@lru_cache(maxsize=64)
def policy_of(spec: str, block: int) -> Policy:
    """The policy of a KV method in its text form, for blocks of so many tokens.

    Raises:
        ConfigError: its budget is too small for whole blocks.
    """
    method = parse(spec)
    if isinstance(method, StreamingLLM):
        return Streaming(method, block)
    assert isinstance(method, PromptCompression)
    return Compaction(method, block)
