"""Tiny random-weight models of every supported text family, built from configurations: offline and fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
SLIDING = 16


def _build(kind: Callable[..., PretrainedConfig], **changes: Any) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return kind(**(common | changes))


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _build(LlamaConfig),
    "mistral": lambda: _build(MistralConfig, sliding_window=None),
    "qwen2": lambda: _build(Qwen2Config),
    "qwen3": lambda: _build(Qwen3Config),
    "qwen3_moe": lambda: _build(Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "gemma2": lambda: _build(Gemma2Config, sliding_window=SLIDING, query_pre_attn_scalar=24),
    "gemma3": lambda: _build(
        Gemma3TextConfig,
        sliding_window=SLIDING,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: _build(Phi3Config, sliding_window=None),
    "gpt_oss": lambda: _build(GptOssConfig, sliding_window=SLIDING, num_local_experts=4, num_experts_per_tok=2),
    "glm4": lambda: _build(Glm4Config),
    "deepseek_v3": lambda: _build(
        DeepseekV3Config,
        num_key_value_heads=4,
        head_dim=8,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}
FAMILIES = tuple(CONFIGS)
# softcap and learned sinks exist in the eager form only
ATTENTION = {"gemma2": "eager", "gpt_oss": "eager"}


def sliding_mistral() -> PretrainedConfig:
    """A configuration all of whose layers are sliding: nothing to compress."""
    return _build(MistralConfig, sliding_window=SLIDING)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of this family in fp32 and eval mode; weights from ``seed``, wide enough for sharp attention;
    ``changes`` of its configuration."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config.initializer_range = 0.15
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION.get(family, "sdpa"))
    if family == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    for name, weight in model.named_parameters():
        if name.endswith("k_norm.weight"):  # as after training: keys that all have one length tell methods nothing
            weight.data += torch.rand_like(weight) - 0.5
    return model.float().eval()


def prompt(length: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def distinct(length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [1, length] none of which repeats: what a method makes of equal tokens may differ by rounding
    alone, and then whether they are read in one call or in several decides which of them stays."""
    generator = torch.Generator().manual_seed(seed)
    return 3 + torch.randperm(VOCABULARY - 3, generator=generator)[None, :length]


def left_padded(
    lengths: list[int], seed: int = 1, make: Callable[[int, int], torch.Tensor] = prompt
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [rows, max(lengths)] of rows with different lengths, padded on the left."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = make(length, seed + row)[0]
        mask[row, longest - length :] = 1
    return ids, mask
