"""A model on torch's meta device: all shapes, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from llm_accel.assets import NEEDLE
from llm_accel.cache.stock import windows_of
from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.eval.cost import ModelCost
from llm_accel.eval.tasks.bench.memory import TensorBytes
from llm_accel.eval.tasks.bench.shapes import SHAPES, build, shape_config
from llm_accel.patches.acceptance import stock_layers
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.footprint import Storage
from llm_accel.patches.wiring import Wiring, wiring_of

_NAME = "llm_accel_plan"
_TOKENS = 64  # whole chunks of linear attention


@dataclass(frozen=True)
class Geometry(Storage):
    """What the arithmetic needs of a model.

    Attributes:
        model: on the meta device.
        weight_bytes: all parameters.
        fixed_bytes: parameters that every decode step reads.
        expert_bytes: parameters of all routed experts, of which a token uses ``active`` of ``experts``.
        token_bytes: activations that reading one token of a prompt takes at most, beside keys and values.
    """

    model: Any
    weight_bytes: int
    fixed_bytes: int
    expert_bytes: int
    experts: int
    active: int
    token_bytes: int

    def step_bytes(self, batch: int) -> int:
        """Parameters that a decode step of ``batch`` rows reads: of the experts at most as many as the rows choose."""
        used = min(self.experts, batch * self.active)
        return self.fixed_bytes + (self.expert_bytes * used // self.experts if self.experts else 0)


def load_config(name: str | None) -> Any:
    """The configuration of a model: of the bundled one, a geometry by name, a file or folder, or from the hub.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    if name in SHAPES:
        return shape_config(name)
    path = NEEDLE if name is None else Path(name).expanduser()
    try:
        return AutoConfig.from_pretrained(path if name is None or path.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--model {name!r} has no configuration: {str(error).splitlines()[0]} Give a HuggingFace id, a folder or "
            f"config.json, or one of {', '.join(SHAPES)}."
        ) from error


def geometry(config: Any, dtype: str) -> Geometry:
    """Worked out on the modules; nothing is loaded.

    Raises:
        ConfigError: no model can be built from the configuration.
        UnsupportedModelError: a call of it on the meta device fails.
    """
    wanted = getattr(config.get_text_config(), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    model = build(config, wanted or torch.bfloat16, torch.device("meta"), None, 0)
    decoder, cost = model.get_decoder(), ModelCost.of(model)
    decoder.config._experts_implementation_internal = "batched_mm"  # others ask values which expert a token goes to
    wiring = wiring_of(decoder)
    if wiring.problem is not None:
        raise UnsupportedModelError(f"{decoder.config.model_type} cannot be planned: {wiring.problem}.")
    experts, active, expert_bytes = _experts(decoder)
    return Geometry(
        wiring,
        windows_of(stock_layers(decoder.config)),
        model,
        cost.weight_bytes,
        cost.step_bytes - expert_bytes,
        expert_bytes,
        experts,
        active,
        _token_bytes(model, wiring),
    )


def _token_bytes(model: Any, wiring: Wiring) -> int:
    """Activations of one token, from the peaks of two lengths. Experts are run as they are on a GPU, all tokens of one
    together; the operation for that takes shapes of one type only, bfloat16."""
    decoder, dtype = model.get_decoder(), model.dtype
    decoder.config._experts_implementation_internal = "grouped_mm"
    model.to(torch.bfloat16)
    try:
        short, long = _peak(decoder, _TOKENS), _peak(decoder, 2 * _TOKENS)
    finally:
        model.to(dtype)
    entries = sum(entry.nbytes for entry in wiring.entries.values())
    itemsize: int = dtype.itemsize
    return (long - short) * itemsize // (2 * _TOKENS) - entries


def _experts(decoder: Any) -> tuple[int, int, int]:
    """Routed experts of a layer, how many of them a token uses, and bytes of all; zeros for a model without."""
    config = decoder.config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((int(count) for name in names if (count := getattr(config, name, None))), 0)
    active = int(getattr(config, "num_experts_per_tok", None) or experts)
    held = [p.nbytes for p in decoder.parameters() if experts and p.ndim == 3 and p.shape[0] == experts]
    return (experts, active, sum(held)) if held else (0, 0, 0)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """The shape of an output, [B, T, Hq, Dv]; kernels that need no memory for all pairs make no more."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _peak(decoder: Any, count: int) -> int:
    """Bytes of all tensors that reading ``count`` tokens holds at most."""
    tensors = TensorBytes()
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    ids, before = torch.ones(1, count, dtype=torch.long, device="meta"), decoder.config._attn_implementation
    decoder.config._attn_implementation_internal = _NAME
    try:
        with torch.no_grad(), tensors:
            decoder(input_ids=ids, use_cache=True, **{CACHE: DynamicCache(config=decoder.config)})
    finally:
        decoder.config._attn_implementation_internal = before
    return tensors.peak
