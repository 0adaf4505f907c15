"""Who a model is: enough to refuse a cache or a head profile that belongs to another one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
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
        local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
        if local.device.type == "meta":
            return "offloaded"
        values = local.detach().flatten()[:_SAMPLE].float().cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(model: PreTrainedModel) -> dict[str, str]:
    """Model type, configuration and weights in a few characters each."""
    return {
        "model_type": str(model.config.model_type),
        "config": config_hash(model),
        "weights": weight_hash(model),
    }
