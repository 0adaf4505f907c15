"""Configurations of vision-language families whose towers are declared, beside those of tests.tiny_vlm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.tiny_vlm import CLIP, GRID, MARKS, QWEN_MARKS, QWEN_VISION, TEXT, VIDEO

SIGLIP: dict[str, Any] = {name: CLIP[name] for name in CLIP if name != "projection_dim"}
PLAIN: dict[str, Any] = {name: SIGLIP[name] for name in SIGLIP if name not in ("image_size", "patch_size")}
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
GLM_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "image_size": 56,
    "patch_size": 14,
}
GLM_MARKS: dict[str, int] = {**MARKS, "image_start_token_id": 122, "image_end_token_id": 123}
GLM_MARKS |= {"video_start_token_id": 124, "video_end_token_id": 125}
GLM_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN3_VISION: dict[str, Any] = {
    **QWEN_VISION,
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}


def llama(**more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": "llama", **more}


TOWERS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "idefics3": ("Idefics3", lambda: {"vision_config": SIGLIP, "text_config": llama(), "scale_factor": 2}),
    "smolvlm": ("SmolVLM", lambda: {"vision_config": SIGLIP, "text_config": llama(), "scale_factor": 2}),
    "deepseek_vl": (
        "DeepseekVL",
        lambda: {"vision_config": {**SIGLIP, "model_type": "siglip_vision_model"}, "text_config": llama()},
    ),
    "janus": (
        "Janus",
        lambda: {
            "vision_config": {**SIGLIP, "projection_dim": 32, "num_image_tokens": 16},
            "text_config": llama(),
            "vq_config": {
                "num_embeddings": 8,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
        },
    ),
    "ovis2": (
        "Ovis2",
        lambda: {
            "vision_config": {**SIGLIP, "vocab_size": 24},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "visual_indicator_token_ids": [122, 123, 124, 125, 126],
            "vocab_size": 128,
            "hidden_size": 32,
        },
    ),
    "llava_next_video": (
        "LlavaNextVideo",
        lambda: {
            "vision_config": {**CLIP, "model_type": "clip_vision_model"},
            "text_config": llama(),
            "image_grid_pinpoints": GRID,
            "video_token_index": VIDEO,
        },
    ),
    "video_llama_3": (
        "VideoLlama3",
        lambda: {
            "vision_config": {**PLAIN, "num_hidden_layers": 2, "patch_size": 14},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "video_token_id": VIDEO,
        },
    ),
    "paddleocr_vl": (
        "PaddleOCRVL",
        lambda: {
            "vision_config": {**SIGLIP, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14},
            "text_config": {**TEXT, "rope_parameters": MROPE},
            **QWEN_MARKS,
        },
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoe",
        lambda: {
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "patch_size": 14,
            },
            "text_config": {
                **{name: TEXT[name] for name in TEXT if name != "head_dim"},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            **GLM_MARKS,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        lambda: {
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {**TEXT, **MOE, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            **QWEN_MARKS,
        },
    ),
    "glm4v": (
        "Glm4v",
        lambda: {
            "vision_config": GLM_VISION,
            "text_config": {**TEXT, "rope_parameters": GLM_ROPE},
            **GLM_MARKS,
        },
    ),
    "glm4v_moe": (
        "Glm4vMoe",
        lambda: {
            "vision_config": GLM_VISION,
            "text_config": {
                **TEXT,
                "rope_parameters": GLM_ROPE | {"partial_rotary_factor": 1.0},
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
            },
            **GLM_MARKS,
        },
    ),
    "glm46v": (
        "Glm46V",
        lambda: {
            "vision_config": {**GLM_VISION, "model_type": "glm4v_vision"},
            "text_config": {**TEXT, "model_type": "glm4v_text", "rope_parameters": GLM_ROPE},
            **GLM_MARKS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        lambda: {
            "vision_config": QWEN3_VISION,
            "text_config": {**TEXT, **LINEAR, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            **QWEN_MARKS,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        lambda: {
            "vision_config": QWEN3_VISION,
            "text_config": {
                **TEXT,
                **LINEAR,
                **MOE,
                "shared_expert_intermediate_size": 16,
                "rope_parameters": MROPE | {"mrope_interleaved": True},
            },
            **QWEN_MARKS,
        },
    ),
    "glm_ocr": (
        "GlmOcr",
        lambda: {
            "vision_config": GLM_VISION,
            "text_config": {**TEXT, "rope_parameters": GLM_ROPE},
            **GLM_MARKS,
        },
    ),
}
