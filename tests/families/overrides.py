"""What the names of fields cannot tell about a family's sizes: a table by ``model_type``, used for building alone."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_BY_KIND = {"sliding_attention": _ROPE, "full_attention": _ROPE}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": _ROPE | {"mrope_section": list(sections)}}


OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "cohere_compass_text": {"layer_types": _ALTERNATING, "rope_parameters": _BY_KIND},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"layer_types": _ALTERNATING},
    "mistral": {"sliding_window": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "glm46v_text": _mrope(4, 2, 2),
    "glm4v_moe_text": _mrope(2, 1, 1),
    "glm4v_text": _mrope(4, 2, 2),
    "glm_ocr_text": _mrope(4, 2, 2),
    "glmga_text": _mrope(4, 2, 2),
    "paddleocr_vl_text": _mrope(4, 2, 2),
    "ernie4_5_vl_moe_text": _mrope(3, 3, 2),
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}

# options that change what a family's attention or cache is, each judged as a case of its own: family -> label -> fields
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "mistral": {"all layers sliding": {"sliding_window": 16}},
    "dory": {"one cache for all loops": {"recurrent_kv_cache_mode": "last_loop"}},
    "gemma4_text": {"shared keys": {"num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"shared keys": {"num_kv_shared_layers": 2}},
}
