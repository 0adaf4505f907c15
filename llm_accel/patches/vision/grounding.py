"""Methods against hallucination on one model: what is planned of them, and what the report says they did."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llm_accel.cache import AccelLayer, MarkedLayer
from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import Downsample, Grounding, HeadScaling, MethodConfig, WeightShift

if TYPE_CHECKING:
    from llm_accel.patches.plan import Plan


def plan_grounding(model: Any, configs: Sequence[MethodConfig], recurrent: Collection[int]) -> dict[str, Any]:
    """The arguments of a plan that concern such methods; those that are switched off have no part in it. ``recurrent``:
    layers without attention.

    Raises:
        ConfigError: a method has no layer to act on, or names a channel that there is not.
        UnsupportedModelError: the model has what a method cannot work with.
    """
    acting = [config for config in configs if isinstance(config, Grounding) and config.acts]
    planned: dict[str, Any] = {}
    for method in acting:
        layers = _layers(method, model.get_decoder().config, recurrent)
        if isinstance(method, HeadScaling):
            _check_resident(model, method)
            planned |= {"head_scaling": method, "scaled_layers": layers}
            said = {method.name: (f"layers {_ranges(layers)}", "outputs of heads are scaled")}
        elif isinstance(method, WeightShift):
            _check_input(method, configs)
            told = _told(model, method)
            planned |= {"weight_shift": told, "shifted_layers": layers}
            said = {method.name: (f"layers {_ranges(layers)}", "attention is corrected")} | _found(method, told)
        planned["backends"] = planned.get("backends", {}) | said
    return planned


def _layers(method: Grounding, config: Any, recurrent: Collection[int]) -> frozenset[int]:
    layers = [layer for layer in method.acting_layers(int(config.num_hidden_layers)) if layer not in recurrent]
    if not layers:
        raise ConfigError(
            f"{method.spec()} acts in no layer of {config.model_type}, which has {config.num_hidden_layers} layers, "
            f"{len(recurrent)} of them without attention."
        )
    return frozenset(layers)


def _check_resident(model: Any, method: HeadScaling) -> None:
    """A layer runs within another call of itself, whose weights must stay where they are."""
    if any(parameter.device.type == "meta" for parameter in model.get_decoder().parameters()):
        raise UnsupportedModelError(
            f"{method.spec()} runs layers within one another, but weights of {model.config.model_type} are not in "
            "memory and come for each call alone; load the language model whole."
        )


def _check_input(method: WeightShift, configs: Sequence[MethodConfig]) -> None:
    other = next((config for config in configs if isinstance(config, Downsample)), None)
    if other is not None and method.reads_tower:
        raise ConfigError(
            f"{method.spec()} marks tokens by what the vision tower attends to, which {other.spec()} shows another "
            "image; give one of them, or one weight for all visual tokens (alpha=0.2,beta=0.2,local=1)."
        )


def _told(model: Any, method: WeightShift) -> WeightShift:
    """The method with what it must know of the model."""
    decoder = model.get_decoder()
    layers, width = int(decoder.config.num_hidden_layers), int(decoder.config.hidden_size)
    beyond = [dim for dim in getattr(method, "dims", None) or () if dim >= width]
    if beyond:
        raise ConfigError(
            f"{method.spec()}: dimension {beyond[0]}, but {decoder.config.model_type} has {width} channels."
        )
    if not method.wants_states:
        return method
    if any(parameter.device.type == "meta" for parameter in decoder.parameters()):
        raise UnsupportedModelError(
            f"{method.spec()} reads a token to find where sinks stand out, but weights of {decoder.config.model_type} "
            "are not in memory; give dims."
        )
    first = getattr(decoder.config, "bos_token_id", None)
    token = torch.tensor([[first if isinstance(first, int) else 0]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        read = decoder(inputs_embeds=model.get_input_embeddings()(token), use_cache=False, output_hidden_states=True)
    return method.told([state.to(token.device) for state in read.hidden_states], layers)


def _found(given: WeightShift, told: WeightShift) -> dict[str, tuple[str, str]]:
    if told is given:
        return {}
    dims = getattr(told, "dims", ()) or ()
    found = f"dimensions {', '.join(map(str, dims))}" if dims else "no dimension, so nothing is ever shifted"
    return {"sinks": (found, "found with the first token")}


def _ranges(layers: Collection[int]) -> str:
    """Layer indices as 1, 18-31."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def grounding_of(plan: Plan, layer: AccelLayer) -> dict[str, Any]:
    """What stands in the report of a layer."""
    said: dict[str, Any] = {}
    if layer.factors is not None:
        said["scaled_heads"] = [(row != 1).nonzero()[:, 0].tolist() for row in layer.factors]
    if isinstance(layer, MarkedLayer) and layer.marks is not None and plan.weight_shift is not None:
        said |= plan.weight_shift.counted(layer.marks[:, 0])
        if layer.shifted is not None and layer.asked is not None:
            said |= {"shifted": int(layer.shifted), "asked": int(layer.asked)}
    return said
