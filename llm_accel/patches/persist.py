"""Compressed caches on disk: safetensors with the method and the model they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from llm_accel.cache import AccelLayer
from llm_accel.cache.linear import restore_states, states_of
from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.patches.hook import attach_session, session_of
from llm_accel.patches.identity import identity
from llm_accel.patches.plan import Plan
from llm_accel.patches.ranks import own_file
from llm_accel.patches.replay import is_waiting

FORMAT = "llm_accel cache 1"
_STOCK_TENSORS = ("keys", "values")
_STOCK_VALUES = ("cumulative_length",)


def save_cache(cache: DynamicCache, path: str | Path, model: PreTrainedModel, plan: Plan) -> None:
    """Writes a filled cache; a file that exists is replaced only when the new one is complete. Processes that share a
    model write a file each.

    Raises:
        UnsupportedCallError: the cache is not one of the applied method's, it is empty, or a call on it failed.
    """
    session = session_of(cache)
    if session is None or session.plan != plan:
        raise UnsupportedCallError(f"this cache was not filled with {plan.title}; save it through the handle that did.")
    if cache.get_seq_length() == 0:
        raise UnsupportedCallError("this cache is empty; run the prompt through the model first.")
    if is_waiting(cache):
        raise UnsupportedCallError(
            "this cache has not been continued since handle.prefill; call model.generate(**cache.inputs) first."
        )
    session.check_whole(cache.get_seq_length())
    tensors: dict[str, Tensor] = {}
    values: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        layer_tensors, layer_values = _state(layer)
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in layer_tensors.items()}
        values.append(layer_values)
    metadata = {
        "format": FORMAT,
        "method": plan.title,
        "model": json.dumps(identity(model)),
        "layers": json.dumps(values),
    }
    target = own_file(path, model)
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.replace(target)


def load_cache(path: str | Path, model: PreTrainedModel, plan: Plan) -> DynamicCache:
    """Reads a cache that was saved with the same method on the same model, by as many processes.

    Raises:
        ConfigError: the file is missing or no cache, or belongs to another method or model.
    """
    path = own_file(path, model)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, model, plan)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as a saved cache ({error}); give a file from handle.save_cache."
        ) from error
    cache = DynamicCache()
    attach_session(cache, plan, model.get_decoder().config)
    device = model.get_input_embeddings().weight.device
    for index, values in enumerate(json.loads(metadata["layers"])):
        prefix = f"{index}."
        # copied: the file lies in memory at any address, and sums in its tensors would differ in their last bits
        own = {
            name.removeprefix(prefix): tensor.to(device, copy=True)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        _restore(cache.layers[index], own, values)
    return cache


def _check(path: str | Path, metadata: dict[str, str], model: PreTrainedModel, plan: Plan) -> None:
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} is no saved cache of this format ({FORMAT}); give a file from handle.save_cache.")
    if metadata["method"] != plan.title:
        raise ConfigError(
            f"{path} was saved with {metadata['method']}, the model runs {plan.title}; apply the same method."
        )
    saved, present = json.loads(metadata["model"]), identity(model)
    different = [
        key for key in present if saved.get(key) != present[key] and "offloaded" not in (saved.get(key), present[key])
    ]
    if different:
        listed = ", ".join(f"{key} {saved.get(key)} there, {present[key]} here" for key in different)
        raise ConfigError(f"{path} belongs to another model: {listed}.")


def _state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(layer, AccelLayer):
        return layer.state()
    tensors = {name: getattr(layer, name) for name in _STOCK_TENSORS if getattr(layer, name, None) is not None}
    return tensors | states_of(layer), {name: getattr(layer, name) for name in _STOCK_VALUES if hasattr(layer, name)}


def _restore(layer: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    if isinstance(layer, AccelLayer):
        layer.restore(tensors, values)
        return
    tensors = restore_states(layer, tensors)
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        for name, content in (tensors | values).items():
            setattr(layer, name, content)
