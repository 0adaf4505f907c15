"""Which methods an engine runs, from ``hf_overrides={"llm_accel": {"method": "flowcut:budget=64+snapkv:budget=512"}}``.

vLLM carries the overrides with the configuration of the model, into all of its processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.methods import (
    AttentionMethod,
    Auto,
    ContextCompression,
    Downsample,
    EntranceTokens,
    Grounding,
    LayerCut,
    MethodConfig,
    PromptCompression,
    RetrievalHeads,
    ScoreAndKeep,
    StepEviction,
    StreamingLLM,
    VASparse,
    VideoTokens,
    VisualTokens,
)
from llm_accel.registry import parse_all, spec_of

KEY = "llm_accel"


@dataclass(frozen=True)
class Settings:
    """What one engine is to do.

    Attributes:
        kv: what decides which KV blocks a request keeps, or None.
        visual: what decides which visual tokens of an image enter the language model, or None.
    """

    kv: PromptCompression | StreamingLLM | None = None
    visual: VisualTokens | None = None

    @property
    def spec(self) -> str:
        """The methods in their text form."""
        return spec_of([method for method in (self.visual, self.kv) if method is not None])


def settings_of(model_config: Any) -> Settings | None:
    """What an engine asks for, from vLLM's configuration of its model; None where it does not mention us, or asks for
    ``dense``. Language models within others have a Hugging Face configuration of their own, but the same overrides.

    Raises:
        LlmAccelError: there is no such method or option, or vLLM cannot run it: the message says why.
    """
    overrides = getattr(model_config, "hf_overrides", None)
    given = overrides.get(KEY) if isinstance(overrides, Mapping) else None
    if given is None:
        given = getattr(model_config.hf_config, KEY, None)
    return None if given is None else read_settings(given)


def read_settings(given: Any) -> Settings | None:
    """:func:`settings_of` for the value under our key."""
    if not isinstance(given, Mapping) or set(given) != {"method"} or not isinstance(given["method"], str):
        raise ConfigError(
            f'hf_overrides: {KEY}={given!r} is not allowed; give {{"method": "NAME:OPTION=VALUE,..."}}, for example '
            f'{{"{KEY}": {{"method": "snapkv:budget=2048"}}}}.'
        )
    methods = [_accepted(method) for method in parse_all(given["method"])]
    kv = [method for method in methods if isinstance(method, ScoreAndKeep)]
    visual = [method for method in methods if isinstance(method, VisualTokens)]
    if len(kv) > 1 or len(visual) > 1:
        raise ConfigError(
            f"hf_overrides: {given['method']!r} names several methods for the same thing; vLLM runs at most one that "
            "decides about KV entries and one that decides about visual tokens."
        )
    return Settings(kv[0] if kv else None, visual[0] if visual else None) if methods else None  # type: ignore[arg-type]


def _accepted(method: MethodConfig) -> MethodConfig:
    reason = refusal(method)
    if reason is not None:
        raise ConfigError(f"{method.spec()} cannot run in vLLM: {reason}.")
    return method.one_stage() if isinstance(method, VisualTokens) else method


def refusal(method: MethodConfig) -> str | None:
    """Why vLLM cannot run a method; None where it can."""
    if isinstance(method, VisualTokens):
        return _visual_refusal(method)
    if isinstance(method, ContextCompression):
        return "it lets the model read the prompt a second time, which vLLM schedules once"
    if isinstance(method, Auto):
        return "it chooses by a trial call of apply; give the method itself"
    if isinstance(method, ScoreAndKeep):
        return _kv_refusal(method)
    if isinstance(method, RetrievalHeads):
        return "some of its heads keep all entries and others a few, but one block table serves all heads of a layer"
    if isinstance(method, AttentionMethod):
        return "it replaces the attention kernel and frees no block; apply it in transformers"
    if isinstance(method, LayerCut):
        return "tokens would leave between layers, but vLLM lays out all layers of a step before the first one runs"
    if isinstance(method, Downsample):
        return "the image would change size behind the processor; have vLLM make it smaller by mm_processor_kwargs"
    if isinstance(method, VASparse):
        return "it needs a second forward pass for each token of the reply"
    if isinstance(method, EntranceTokens):
        return "it compares the tokens of a whole prompt, but vLLM embeds images one by one and keeps them for others"
    if isinstance(method, VideoTokens):
        return "it compares the frames of a video; vLLM has such methods of its own, see its video_pruning_rate"
    if isinstance(method, Grounding):
        return "it changes what attention gives within each layer, which vLLM's own kernels compute and hand on"
    return "vLLM has no place for what it does"


def _visual_refusal(method: VisualTokens) -> str | None:
    if method.always_cuts:
        return (
            "its second stage lets tokens leave between layers, but vLLM lays out all layers of a step before the "
            "first one runs; give llm_stage=off"
        )
    return None


def _kv_refusal(method: ScoreAndKeep) -> str | None:
    kind = type(method)
    if method.skip_layers:
        return f"skip_layers={method.skip_layers} keeps whole layers, but one block table serves all layers"
    if isinstance(method, StreamingLLM):
        return None if not method.relative_positions else "positions=cache turns keys anew at every step"
    if isinstance(method, StepEviction) or not isinstance(method, PromptCompression):
        return "it evicts single entries at every step, but vLLM frees whole blocks of a request"
    if method.page_size is not None:
        return "its heads keep different numbers of entries, but one block table serves all heads of a layer"
    if not _own(kind, "layer_entries") or not _own(kind, "layer_entries_per_row"):
        return "its layers keep different numbers of entries, but one block table serves all layers"
    if not _own(kind, "select") or not _own(kind, "allocate"):
        return "it chooses in a way of its own; vLLM needs a score, of which every head keeps equally many"
    return None


def _own(kind: type[ScoreAndKeep], name: str) -> bool:
    """Whether a class leaves a method of the role as it is."""
    return getattr(kind, name) is getattr(ScoreAndKeep, name)
