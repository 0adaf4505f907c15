"""Configurations of vision-language families that nobody has declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from tests.tiny_vlm import GRID, IMAGE, QWEN_MARKS, QWEN_VISION, TEXT, VIDEO
from tests.vlm_towers import LINEAR, MOE, MROPE, PLAIN, QWEN3_VISION, SIGLIP, llama

PIXTRAL: dict[str, Any] = {**SIGLIP, "num_hidden_layers": 2, "model_type": "pixtral"}
EXPERTS: dict[str, Any] = {"intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}


OTHERS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "aya_vision": (
        "AyaVision",
        lambda: {
            "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"},
            "text_config": llama(),
            "downsample_factor": 2,
            "adapter_layer_norm_eps": 1e-6,
        },
    ),
    "mistral3": (
        "Mistral3",
        lambda: {
            "vision_config": PIXTRAL,
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "spatial_merge_size": 2,
        },
    ),
    "cohere2_vision": (
        "Cohere2Vision",
        lambda: {
            "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"},
            "text_config": llama(),
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
        },
    ),
    "idefics2": (
        "Idefics2",
        lambda: {
            "vision_config": SIGLIP,
            "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 6,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
        },
    ),
    "lighton_ocr": (
        "LightOnOcr",
        lambda: {"vision_config": PIXTRAL, "text_config": {**TEXT, "model_type": "qwen3"}, "spatial_merge_size": 2},
    ),
    "lfm2_vl": (
        "Lfm2Vl",
        lambda: {
            "vision_config": {**PLAIN, "model_type": "siglip2_vision_model", "patch_size": 7, "num_patches": 16},
            "text_config": {
                **TEXT,
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention", "conv"],
                "block_auto_adjust_ff_dim": False,
            },
            "projector_hidden_size": 32,
        },
    ),
    "llama4": (
        "Llama4",
        lambda: {
            "vision_config": {
                **SIGLIP,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
            },
            "text_config": {
                **TEXT,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "layer_types": ["full_attention"] * 3,
            },
            "image_token_index": IMAGE,
        },
    ),
    "minicpmv4_6": (
        "MiniCPMV4_6",
        lambda: {
            "vision_config": {**SIGLIP, "num_hidden_layers": 3, "insert_layer_id": 1, "image_size": 56},
            "text_config": {
                **TEXT,
                **LINEAR,
                "model_type": "qwen3_5_text",
                "rope_parameters": MROPE | {"mrope_interleaved": True},
            },
            "video_token_id": VIDEO,
        },
    ),
    "aria": (
        "Aria",
        lambda: {
            "vision_config": hf.Idefics3Config(vision_config=SIGLIP).vision_config,
            "text_config": hf.AriaTextConfig(**(TEXT | EXPERTS)),
            "projector_patch_to_query_dict": {"16": 6},
            "image_token_index": IMAGE,
        },
    ),
    "got_ocr2": (
        "GotOcr2",
        lambda: {
            "vision_config": {
                **PLAIN,
                "num_hidden_layers": 2,
                "image_size": 64,
                "patch_size": 4,
                "output_channels": 32,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_index": IMAGE,
        },
    ),
    "exaone4_5": (
        "Exaone4_5_",
        lambda: {
            "vision_config": {
                **QWEN_VISION,
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0, 2],
                "window_size": 56,
                "num_key_value_heads": 1,
            },
            "text_config": {
                **TEXT,
                "model_type": "exaone4",
                "sliding_window": None,
                "layer_types": ["full_attention"] * 3,
            },
            "video_token_id": VIDEO,
        },
    ),
    "granite_docling": (
        "GraniteDocling",
        lambda: {
            "vision_config": {
                **SIGLIP,
                "out_hidden_size": 32,
                "scale_factor": 2,
                "deepstack_visual_indexes": [1],
                "use_fine_route": False,
            },
            "text_config": {name: TEXT[name] for name in TEXT if name != "head_dim"},
        },
    ),
    "hunyuan_vl": (
        "HunYuanVL",
        lambda: {
            "vision_config": {
                **PLAIN,
                "num_hidden_layers": 2,
                "out_hidden_size": 32,
                "text_hidden_size": 32,
                "patch_size": 14,
                "max_image_size": 112,
                "min_image_size": 28,
            },
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
            },
        },
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniThinker",
        lambda: {
            "vision_config": {
                **QWEN_VISION,
                "depth": 3,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0, 2],
                "window_size": 56,
            },
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 32,
            },
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": 119,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
        },
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinker",
        lambda: {
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
            "text_config": {**TEXT, **MOE, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            **QWEN_MARKS,
            "audio_token_id": 119,
        },
    ),
    "molmo2": (
        "Molmo2",
        lambda: {
            "vision_config": {**SIGLIP, "image_size": [28, 28], "num_key_value_heads": 2, "head_dim": 16},
            "adapter_config": {
                "vision_feature_layer": [-1],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 48,
                "text_hidden_size": 32,
            },
            "text_config": TEXT,
        },
    ),
    "minimax_m3_vl": (
        "MiniMaxM3Sparse",
        lambda: {
            "vision_config": {**PLAIN, "num_hidden_layers": 2, "image_size": 56, "patch_size": 14},
            "text_config": {
                **TEXT,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "dense_intermediate_size": 48,
                "shared_intermediate_size": 16,
                "rotary_dim": 8,
                "layer_types": ["full_attention"] * 3,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            },
            "projector_hidden_size": 32,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
        },
    ),
    "granite4_vision": (
        "Granite4Vision",
        lambda: {
            "vision_config": {**SIGLIP, "hidden_size": 64, "model_type": "siglip_vision_model"},
            "text_config": {name: TEXT[name] for name in TEXT if name != "head_dim"},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": GRID,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-2, 0], [-1, 1]],
            "spatial_target_layers": [],
        },
    ),
    "gemma4": (
        "Gemma4",
        lambda: {
            "text_config": {
                **TEXT,
                "layer_types": ["full_attention"] * 3,
                "global_head_dim": 8,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 4,
                "vocab_size_per_layer_input": 128,
            },
            "vision_config": {
                **PLAIN,
                "num_hidden_layers": 2,
                "patch_size": 7,
                "head_dim": 16,
                "num_key_value_heads": 2,
            },
        },
    ),
}
