"""Puts what ``auto`` stands for on one model in its place, before a plan is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llm_accel.cache.stock import is_full, windows_of
from llm_accel.errors import AlreadyAppliedError, ConfigError, UnsupportedModelError
from llm_accel.kernels import ragged_decode
from llm_accel.methods import Auto, Dense, MethodConfig, SnapKV, list_methods
from llm_accel.methods.kv.auto import LEAST
from llm_accel.patches.acceptance import decoder_of, stock_layers
from llm_accel.patches.install import attention_problem, make_plan
from llm_accel.patches.plan import Decode, check_composition
from llm_accel.patches.wiring import wiring_of

_SPARE = 0.1  # of a GPU's memory beside the weights, for activations
_SINKS = 64  # of retrieval heads' streams
_WINDOWS = 3  # entries, in windows of the last queries, below which the choice of these queries is not to be trusted


def chosen_methods(
    model: Any, configs: Sequence[MethodConfig], strict: bool = False, decode: Decode = "eager"
) -> tuple[list[MethodConfig], str | None]:
    """``configs`` with the first method in the place of ``auto`` that this model takes together with the others, and a
    line on what was chosen and why; None where there is no ``auto``.

    Raises:
        LlmAccelError: the model takes no method at all; memory holds too little; the others cannot go together.
    """
    auto = next((config for config in configs if isinstance(config, Auto)), None)
    if auto is None:
        return list(configs), None
    check_composition(configs)
    longest, fitting = _limits(model, auto)
    size, why = auto.size(longest, fitting)
    refusals: dict[str, ConfigError | UnsupportedModelError] = {}
    for config, reason in _candidates(auto, model, size, longest):
        chosen = [config if other is auto else other for other in configs]
        if isinstance(config, Dense) and len(chosen) > 1:
            chosen.remove(config)
        try:
            make_plan(model, chosen, False, strict, decode)
        except AlreadyAppliedError:
            raise
        except (ConfigError, UnsupportedModelError) as error:
            refusals[config.name] = error
            continue
        amount = "" if isinstance(config, Dense) else f"; {', '.join(f'{k}={v}' for k, v in size.items())}: {why}"
        refused = "".join(f"; not {name}: {error}" for name, error in refusals.items())
        return chosen, f"{config.spec()}: {reason}{amount}{refused}"
    raise next(iter(refusals.values()))


def _candidates(
    auto: Auto, model: Any, size: dict[str, Any], longest: int | None
) -> Iterator[tuple[MethodConfig, str]]:
    """Methods in order of preference, each with its reason."""
    known = list_methods()
    if auto.question == "in_prompt":
        entries, window = auto.fewest(size, longest), SnapKV().window
        if entries is not None and entries < _WINDOWS * window and "kvzip" in known:
            yield known["kvzip"](**size), f"of {entries} entries a window of {window} would leave too few to choose"
        decode = ragged_decode.OP.choose(attention_problem(decoder_of(model)))
        if decode.name != "torch":
            yield known["adakv"](**size), "the prompt asks; heads share a budget by need, and a kernel reads them"
        yield known["snapkv"](**size), "the prompt asks, and its last queries choose"
    else:
        if "kvzip" in known:
            yield known["kvzip"](**size), "what is asked comes later: what the model needs to repeat the context stays"
        if auto.budget is None and auto.ratio is None and size["budget"] > _SINKS:
            stream = {"sinks": _SINKS, "recent": size["budget"] - _SINKS}
            yield known["retrieval_heads"](**stream), "what is asked comes later: retrieval heads keep everything"
    yield Dense(), "no method that could choose here works on this model, so that everything stays"


def _limits(model: Any, auto: Auto) -> tuple[int | None, int | None]:
    """Tokens that the model was made for, and entries per KV head and layer that memory holds in each of the rows."""
    decoder = decoder_of(model)
    longest: int | None = getattr(decoder.config, "max_position_embeddings", None)
    total = _free_bytes(model) if auto.memory is None else int(auto.memory * 2**30)
    wiring, layers = wiring_of(decoder), stock_layers(decoder.config)
    entry = sum(held.nbytes for index, held in wiring.entries.items() if is_full(layers[index]))
    if total is None or not entry:
        return longest, None
    windows = windows_of(layers)
    fixed = sum(wiring.states.values()) + sum(
        held.nbytes * windows[index] for index, held in wiring.entries.items() if index in windows
    )
    fitting = max(0, total // auto.rows - fixed) // entry
    return longest, fitting if auto.memory is not None else max(fitting, LEAST)


def _free_bytes(model: Any) -> int | None:
    """What the model's GPUs hold beside its weights: the same in every call, so that budgets are; None on a CPU."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    if not devices:
        return None
    weights = sum(tensor.nbytes for tensor in model.parameters() if tensor.device in devices)
    total = sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return int((1 - _SPARE) * max(0, total - weights))
