"""What becomes of single heads of a model: some keep everything while others stream, or some are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_accel.methods.kv.head_profile import Head
from llm_accel.methods.roles import PromptCompression, StepEviction

PerLayer = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModelHeads:
    """The heads of a model.

    Attributes:
        layers, query_heads, kv_heads: L, Hq and Hk.
        eligible: layers that hold a full KV cache and are not skipped.
    """

    layers: int
    query_heads: int
    kv_heads: int
    eligible: tuple[int, ...]


@dataclass(frozen=True)
class HeadSplit:
    """In each layer some KV heads keep everything (or what ``full_compression`` keeps), the others a stream.

    Attributes:
        full: per layer the KV heads that keep everything, ascending.
        streaming: rule for all other heads.
        full_compression: what compresses the full heads after the prompt, or None.
        sinks, recent: what a streaming head sees, the current token included in ``recent``.
        prefill: "dense": all heads see everything until the prompt is complete; "chunk": streaming heads are cut after
            each chunk of it; "lambda": their queries see sinks and window only, at every position.
    """

    full: PerLayer
    streaming: StepEviction
    full_compression: PromptCompression | None
    sinks: int
    recent: int
    prefill: Literal["dense", "chunk", "lambda"]


@dataclass(frozen=True)
class HeadMask:
    """Takes query heads out of the computation, without touching the cache.

    Attributes:
        heads: per layer the masked query heads, ascending.
        mode: "zero": no output; "uniform": equal weight on all visible entries; "window": sinks and recent entries.
        phase: "decode": while decoding and for the last token of the prompt; "all": at every position.
        sinks, recent: what is seen in mode "window".
    """

    heads: PerLayer
    mode: Literal["zero", "uniform", "window"]
    phase: Literal["decode", "all"]
    sinks: int
    recent: int


def per_layer(heads: list[Head], layers: int) -> PerLayer:
    """(layer, head) pairs as one ascending line per layer."""
    return tuple(tuple(sorted(head for at, head in heads if at == layer)) for layer in range(layers))
