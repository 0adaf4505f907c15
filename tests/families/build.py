"""Tiny models with random weights of every family that this transformers has."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests import tiny_vlm
from tests.families.overrides import VARIANTS
from tests.families.shrink import tiny_config

TEXT = tuple(
    case
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for case in (family, *(f"{family}:{variant}" for variant in VARIANTS.get(family, ())))
)
VISION = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
STD = 0.15


def text_model(case: str) -> PreTrainedModel:
    """A causal language model of a family, or ``family:variant``, in fp32 and eval mode, with wide weights, so that
    attention is sharp."""
    torch.manual_seed(0)
    family, _, variant = case.partition(":")
    config = tiny_config(family, **(VARIANTS[family][variant] if variant else {}))
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    config = _decoder_of(config, kind.config_class)
    # SDPA of earlier transformers leaves the cap on logits out, which only the methods then know of
    capped = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    return widened(kind._from_config(config, dtype=torch.float32, **capped))


def _decoder_of(config: PretrainedConfig, wanted: type[PretrainedConfig]) -> PretrainedConfig:
    """The part of a configuration that the causal model is made of: all of it for most families."""
    nested = (getattr(config, name) for name in type(config).sub_configs)
    return config if isinstance(config, wanted) else next((one for one in nested if isinstance(one, wanted)), config)


def vision_model(family: str) -> PreTrainedModel:
    """A vision-language model of this family, likewise; the one of :mod:`tests.tiny_vlm` where there is one."""
    if family in tiny_vlm.CONFIGS:
        return tiny_vlm.tiny_vlm(family)
    torch.manual_seed(0)
    return widened(AutoModelForImageTextToText.from_config(tiny_config(family), dtype=torch.float32))


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode with wide weights, factors that begin at zero too; it does not end an answer by itself."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            factor = not weight.any() and name.rpartition(".")[2] not in ("bias", "weight")
            if weight.ndim > 1 or factor or not torch.isfinite(weight).all() or name.endswith("sinks"):
                weight.normal_(std=STD, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.float().eval()
