"""Tiny models of vision-language families that are not declared, or declared lately, with one image that fits each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_vlm import CLIP, GRID, IMAGE, MARKS, QWEN_MARKS, QWEN_VISION, TEXT, VIDEO, widened

SIGLIP: dict[str, Any] = {name: CLIP[name] for name in CLIP if name != "projection_dim"}
PLAIN: dict[str, Any] = {name: SIGLIP[name] for name in SIGLIP if name not in ("image_size", "patch_size")}
PIXTRAL: dict[str, Any] = {**SIGLIP, "num_hidden_layers": 2, "model_type": "pixtral"}
MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
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
EXPERTS: dict[str, Any] = {"intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}


def llama(**more: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": "llama", **more}


CONFIGS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
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
    "glm_ocr": (
        "GlmOcr",
        lambda: {
            "vision_config": GLM_VISION,
            "text_config": {**TEXT, "rope_parameters": GLM_ROPE},
            **GLM_MARKS,
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
    "qwen3_5": (
        "Qwen3_5",
        lambda: {
            "vision_config": QWEN3_VISION,
            "text_config": {**TEXT, **LINEAR, "rope_parameters": MROPE | {"mrope_interleaved": True}},
            **QWEN_MARKS,
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
            "vision_config": {**PLAIN, "num_hidden_layers": 2, "patch_size": 7, "head_dim": 16, "num_key_value_heads": 2},
        },
    ),
}


def built(family: str, **changes: Any) -> PreTrainedModel:
    """A model of this family; skips where this transformers has none."""
    stem, arguments = CONFIGS[family]
    model = getattr(hf, f"{stem}ForConditionalGeneration", None)
    if model is None:
        pytest.skip(f"this transformers has no {family}")
    marks = {"image_token_id": IMAGE}
    torch.manual_seed(0)
    return widened(model(model.config_class(**{**marks, **arguments(), **changes})))


def image_of(model: PreTrainedModel, seed: int = 5) -> dict[str, Tensor]:
    """What the processor of the family makes of one image."""
    family, generator = model.config.model_type, torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid = torch.tensor([[1, 4, 8 if seed % 2 else 4]])
    patches = int(grid.prod())
    if family in ("idefics2", "idefics3", "smolvlm"):
        return {"pixel_values": noise(1, 1, 3, 28, 28)}
    if family in ("mistral3", "lighton_ocr"):
        return {"pixel_values": noise(1, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    if family in ("llava_next_video", "granite4_vision"):
        sizes = [[56, 40]] if seed % 2 else [[28, 50]]
        return {"pixel_values": noise(1, 5, 3, 28, 28), "image_sizes": torch.tensor(sizes)}
    if family == "lfm2_vl":
        return {
            "pixel_values": noise(1, 16, 3 * 7 * 7),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
    if family in ("paddleocr_vl", "hunyuan_vl"):
        shape = (patches, 3, 14, 14) if family == "paddleocr_vl" else (patches, 3 * 14 * 14)
        return {"pixel_values": noise(*shape), "image_grid_thw": grid}
    if family == "video_llama_3":
        return {
            "pixel_values": noise(patches, 3 * 14 * 14),
            "image_grid_thw": grid,
            "image_merge_sizes": torch.tensor([2]),
        }
    if family == "ernie4_5_vl_moe":
        return {"pixel_values": noise(patches, 3 * 14 * 14), "image_grid_thw": grid}
    if family.startswith(("qwen", "glm", "exaone4_5", "minimax")):
        return {"pixel_values": noise(patches, 3 * 2 * 14 * 14), "image_grid_thw": grid}
    if family == "minicpmv4_6":
        return {"pixel_values": noise(1, 3, 7, 7 * 64), "target_sizes": torch.tensor([[8, 8]])}
    if family == "got_ocr2":
        return {"pixel_values": noise(1, 3, 64, 64)}
    if family == "molmo2":
        return {
            "pixel_values": noise(2, 16, 3 * 7 * 7),
            "image_token_pooling": torch.arange(20).view(5, 4),
            "image_grids": torch.tensor([[1, 1, 2, 2]]),
            "image_num_crops": torch.tensor([2]),
        }
    if family == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).view(1, 36, 2)
        return {"pixel_values": noise(1, 36, 3 * 7 * 7), "image_position_ids": places}
    if family == "granite_docling":
        return {"pixel_values": noise(1, 1, 3, 28, 28), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    return {"pixel_values": noise(1, 3, 28, 28)}


def feature_rows(model: PreTrainedModel, image: dict[str, Tensor]) -> Tensor:
    """What the language model gets in the places of an image: [tokens, C]."""
    given = {name: value for name, value in image.items()}
    with torch.no_grad():
        rows = model.base_model.get_image_features(**given, return_dict=True).pooler_output
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in rows])


def tokens_of(model: PreTrainedModel, image: dict[str, Tensor]) -> int:
    """Placeholders of an image, as the model itself counts them."""
    if model.config.model_type == "llama4":
        return 4  # of 16 patches
    if model.config.model_type == "granite4_vision":
        return len(model.base_model.get_image_features(**image).deepstack_features[0][1][0])
    return len(feature_rows(model, image))


def scene(model: PreTrainedModel, seed: int = 5, before: int = 3) -> dict[str, Tensor]:
    """One prompt with one image."""
    image = image_of(model, seed)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 110, (before + 5,), generator=generator).tolist()
    ids = torch.tensor([[*words[:before], *[IMAGE] * tokens_of(model, image), *words[before:]]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image, **_kinds(model, ids)}


def scenes(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two prompts of different lengths as one batch, padded on the left, and each alone."""
    alone = [scene(model, 5, before=6), scene(model, 6, before=2)]
    longest = max(one["input_ids"].shape[1] for one in alone)
    joined: dict[str, Tensor] = {}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in alone]
        joined[name] = torch.cat(rows)
    for name in image_of(model):
        packed = model.config.model_type == "minicpmv4_6" and name == "pixel_values"
        joined[name] = torch.cat([one[name] for one in alone], dim=3 if packed else 0)
    return joined | _kinds(model, joined["input_ids"]), alone


def _kinds(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are an image's, by all names under which the model asks for that."""
    names = ("mm_token_type_ids", "moe_mm_token_type_ids")
    known = inspect.signature(model.forward).parameters
    return {name: (ids == IMAGE).int() for name in names if name in known}


def images_in(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch concerns its images alone."""
    return {name: value for name, value in batch.items() if not name.endswith(("_ids", "attention_mask")) or "pixel" in name}
