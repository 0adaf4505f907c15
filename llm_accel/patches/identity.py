"""Who a model is: enough to refuse a cache or a head profile that belongs to another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")
_SAMPLE = 256


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the text configuration without what does not change the computation, 16 hex digits."""
    config = model.config.get_text_config(decoder=True).to_dict()
    shape = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weight_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the first values of the first and last decoder weights, 16 hex digits; "offloaded" where they are
    not in memory."""
    parameters = list(model.get_decoder().parameters())
    digest = hashlib.sha256()
    for weight in (parameters[0], parameters[-1], parameters[len(parameters) // 2]):
        if weight.device.type == "meta":
            return "offloaded"
        values = _first(weight.detach()).float().cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first(weight: Any) -> Tensor:
    """The first values of a weight; of one that processes share, those of the whole, which all of them must ask for."""
    rows = 1 + (_SAMPLE - 1) // max(1, weight.shape[1:].numel())
    if hasattr(weight, "to_local"):
        from torch.distributed.tensor import Shard

        part = weight.to_local()[:rows]
        places = [Shard(place.dim) if hasattr(place, "dim") else place for place in weight.placements]
        weight = type(weight).from_local(part, weight.device_mesh, places, run_check=False).full_tensor()
    values: Tensor = weight[:rows].flatten()[:_SAMPLE]
    return values


def identity(model: PreTrainedModel) -> dict[str, str]:
    """Model type, configuration and weights in a few characters each."""
    return {
        "model_type": str(model.config.model_type),
        "config": config_hash(model),
        "weights": weight_hash(model),
    }
