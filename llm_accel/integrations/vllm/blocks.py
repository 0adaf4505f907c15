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
class BlockCut:
    """Entries of a request that move in one step.

    Attributes:
        at: tokens that are computed when the step begins.
        blocks: which of the request's blocks hold them, in their order.
        entries: how many they are; they fill the last of the blocks in part.
        kept: full blocks that hold what stays of them, but for the last block, which stays where it is.
    """

    at: int
    blocks: tuple[int, ...]
    entries: int
    kept: int


@dataclass(frozen=True)
class Compaction:
    """The kept entries of the full blocks of the prompt move into its first blocks, in the step that decodes the first
    token; the blocks behind them leave. The last block, partly filled, stays where it is: what it holds is kept by
    force, and so the budget is rounded down by less than a block.

    With ``recompress_every``, rounded down to whole blocks, the same happens whenever so many tokens were added; a
    prompt within the budget is cut once budget and reply hold as many more. The last block is filled as far each time.
    """

    method: PromptCompression
    block: int

    def __post_init__(self) -> None:
        every = self.method.cuts_every
        if every is not None and every < self.block:
            raise ConfigError(
                f"{self.method.spec()}: vLLM frees whole blocks of {self.block} tokens, so recompress_every here is at "
                f"least {self.block}."
            )
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

    @property
    def every(self) -> int | None:
        """Tokens from one cut to the next, whole blocks of them; None where the prompt alone is cut."""
        every = self.method.cuts_every
        return None if every is None else every // self.block * self.block

    def _budget(self, prompt: int) -> int:
        """Entries that are left after each cut."""
        if self.every is not None and prompt <= self.method.entries(2**62):
            return self.method.entries(2**62)  # the first cut is where it comes out even
        return self.kept(prompt) * self.block + prompt % self.block

    def _first_cut(self, prompt: int) -> int:
        """Tokens that are computed at the first cut."""
        within = self.every is not None and prompt <= self.method.entries(2**62)
        return self._budget(prompt) + (self.every or 0) if within else prompt

    def _last_cut(self, prompt: int, computed: int) -> int | None:
        """Tokens that were computed at the last cut up to now, or None."""
        first = self._first_cut(prompt)
        if computed < first:
            return None
        return first if self.every is None else computed - (computed - first) % self.every

    def gap(self, prompt: int, computed: int) -> tuple[int, int]:
        """First and last (exclusive) block of a request that a token behind ``computed`` ones does not read."""
        cut = self._last_cut(prompt, computed)
        return (0, 0) if cut is None else (self._budget(prompt) // self.block, cut // self.block)

    def freed(self, prompt: int, processed: int) -> tuple[int, int]:
        """The gap that may be free once so many tokens are processed: the step that cuts may still read every block."""
        return self.gap(prompt, processed - 1) if processed > prompt else (0, 0)

    def cut(self, prompt: int, computed: int) -> BlockCut | None:
        """What moves in the step that begins behind ``computed`` tokens, or None."""
        stay, stop = self.gap(prompt, computed)
        if stop <= stay or computed != self._last_cut(prompt, computed):
            return None
        filled = -(-computed // self.block)
        if computed == self._first_cut(prompt):
            return BlockCut(computed, tuple(range(filled)), computed, stay)
        assert self.every is not None
        tail = (computed - self.every) // self.block
        return BlockCut(computed, (*range(stay), *range(tail, filled)), self._budget(prompt) + self.every, stay)

    def looks_back(self, prompt: int, computed: int) -> int:
        """How many queries of tokens before the one behind ``computed`` ones a later cut will look at; -1: not even at
        the query of that one."""
        first = self._first_cut(prompt)
        if computed < first:
            left = first - computed
        elif self.every is None:
            return -1
        else:
            left = self.every - (computed - first) % self.every
        return max(-1, self.method.observed_queries - left)

    def rounded(self, prompt: int) -> PromptCompression:
        """The method with the numbers that whole blocks amount to."""
        return replace(self.method, budget=self._budget(prompt), ratio=None, recompress_every=self.every)


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

    def freed(self, prompt: int, processed: int) -> tuple[int, int]:
        """As :meth:`Compaction.freed`; nothing moves, so nothing is waited for."""
        return self.gap(prompt, processed) if processed > prompt else (0, 0)


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
