"""What one forward call does to a cache."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """The phase of a forward call; one for all layers.

    PREFILL_CHUNK: tokens of the prompt, of which more is to come, or whose eviction waits for the first decode step;
        layers remember the last queries.
    PREFILL_END: the rest of the prompt; layers evict after their attention.
    DEFERRED_EVICTION: the first decode step after a prompt whose eviction has waited; layers evict before their
        attention.
    DECODE: any other decode step.
    """

    PREFILL_CHUNK = "prefill chunk"
    PREFILL_END = "prefill end"
    DEFERRED_EVICTION = "deferred eviction"
    DECODE = "decode"

    @property
    def in_prompt(self) -> bool:
        """Whether the call brings tokens of a prompt, not a decoded one."""
        return self in (Phase.PREFILL_CHUNK, Phase.PREFILL_END)
