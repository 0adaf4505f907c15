"""Tiny configurations of any family: the default configuration of its class with every size made small by its name.

What names cannot tell, one line per family, stands in :mod:`tests.families.overrides`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.overrides import OVERRIDES

VOCABULARY = 128
LAYERS = 4
HEADS = 4
SLIDING = 16

# field name -> small value; the first pattern that matches the whole name decides
SIZES: tuple[tuple[str, int], ...] = (
    (r"encoder_hash_byte_group_vocab", 64),
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"type_vocab_size", 2),
    (r"(text_|audio_|vision_|backbone_)?hidden_size|d_model|n_embd|hidden_dim|dim|width|lru_width|embed_dim", 64),
    (r"embedding_size|word_embed_proj_dim|out_hidden_size|projection_dim|emb_dim", 64),
    (r"projector_hidden_size|output_dim|proj_dim|projector_dim|multimodal_hidden_size", 64),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|n_inner|ffn_hidden_size|d_ff|ffn_dim|feed_forward_size|dff|dim_ff", 96),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers", LAYERS),
    (r"(num_)?encoder_layers|depth", LAYERS),
    (r"num_key_value_heads|num_kv_heads|multi_query_num_heads|num_query_groups", 2),
    (r"swa_num_key_value_heads|num_global_key_value_heads", 2),
    (r"num_attention_heads|n_heads?|num_heads|(num_)?(decoder|encoder)_attention_heads|attention_heads", HEADS),
    (r"swa_num_attention_heads", HEADS),
    (r"head_dim|kv_channels|swa_head_dim|dim_head|attention_head_size|d_head", 16),
    (r"global_head_dim|d_kv", 16),
    (r"q_lora_rank|o_lora_rank", 24),
    (r"kv_lora_rank", 32),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|swa_v_head_dim", 16),
    (r"rotary_dim", 8),
    (r"n_group|num_expert_group|o_groups", 2),
    (r"topk_group", 1),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", 4),
    (r"(moe_)?num_experts_per_(tok|token)|moe_topk|moe_k|top_k_experts|num_selected_experts", 2),
    (r"(moe_)?(n|num)_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 512),
    (r"max_(source|target)_positions|max_sequence_length", 512),
    (r"sliding_window|sliding_window_size|window_size|attention_window_size|attention_chunk_size", SLIDING),
    (r"local_attention_window_len|keep_window_size", SLIDING),
    (r".*(period|interval|pattern|every_n_layers)|layer_group_size|interleave_moe_layer_step", 2),
    (r".*layer_offset|expert_layer_offset", 1),
    (r"index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"index_topk", 8),
    (r"linear_(key|value)_head_dim|linear_head_dim|mamba_d_head|mamba_head_dim|mamba_headdim|ssm_head_dim", 16),
    (r"mamba_d_ssm", 128),
    (r"num_kv_shared_layers", 2),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 2),
    (r"(mamba_)?chunk_size", 16),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"laurel_rank|adapter_rank|gated_norm_rank|loop_gate_rank", 4),
    (r"hidden_size_per_layer_input", 16),
    (r"query_pre_attn_scalar", 24),
    (r"mm_tokens_per_image", 4),
    (r"image_size", 28),
    (r"patch_size", 7),
    (r"conv_kernel_sizes", 3),
)
# sizes that some classes leave open and their models cannot do without
FILLED = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
TOKEN = re.compile(r".*(token|_start|_end)_(id|index)")
FIXED_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The configuration class of ``model_type`` with small sizes; ``changes`` come last."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**(small_fields(kind) | changes))


def small_fields(kind: type[PretrainedConfig], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments that make ``kind`` small; nested configurations are plain data within."""
    override = OVERRIDES.get(kind.model_type, {})
    try:
        default = kind(**(given or {}))
    except Exception:  # some classes have no default that they accept
        default = kind(**(dict(given or {}) | override))
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else vars(default)
    values = {name: _value(default, name) for name in names}
    tokens = _tokens(values)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            nested = small_fields(type(value))
            small[name] = nested | {"model_type": value.model_type} if value.model_type else nested
        elif (size := _size(name, value)) is not None:
            small[name] = size
    small |= {name: size for name, size in FILLED.items() if name in values and values[name] is None}
    if values.get("kv_lora_rank"):  # keys come from a latent that all heads share, one key each
        small["num_key_value_heads"] = small.get("num_attention_heads", HEADS)
    small |= tokens | _per_layer(values)
    return _merged(small, override)


def _value(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a size that differs between layers and can be asked of a layer only
        return getattr(type(config), name, None)


def _merged(small: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """``override`` laid over ``small``, nested configurations field by field."""
    merged = dict(small)
    for name, value in override.items():
        inside = merged.get(name)
        nested = isinstance(value, dict) and isinstance(inside, dict)
        merged[name] = _merged(inside, value) if nested else value
    return merged


def _size(name: str, value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return next((min(size, value) if value > 0 else value for rule, size in SIZES if re.fullmatch(rule, name)), None)


def _tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens inside the small vocabulary, no two alike."""
    found = {name: FIXED_TOKENS[name] for name in values if name in FIXED_TOKENS and values[name] is not None}
    others = [
        name
        for name, value in values.items()
        if name not in FIXED_TOKENS and TOKEN.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return found | {name: VOCABULARY - 1 - place for place, name in enumerate(sorted(others))}


def _per_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, cut to the same few layers, among which every kind of layer is."""
    layers = next((values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int)), 0)
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, list | tuple) and layers and len(value) == layers
    }
    if not lists or layers <= LAYERS:
        return {}
    kinds: dict[str, int] = {}
    for index in range(layers):
        kinds.setdefault(repr([value[index] for value in lists.values()]), index)
    first = sorted(kinds.values())[:LAYERS]
    chosen = sorted((first * LAYERS)[:LAYERS]) if len(first) == 1 else (first * LAYERS)[: max(LAYERS, len(first))]
    cut = {name: [value[index] for index in chosen] for name, value in lists.items()}
    return {
        name: [size if (size := _size(name, one)) is not None else one for one in value] for name, value in cut.items()
    }
