"""Tiny random-weight vision-language models, built from configurations, with prompts whose images fit them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from llm_accel import list_methods
from llm_accel.methods import VideoTokens

VOCABULARY = 128
IMAGE = 120
VIDEO = 121
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 32,
}


GRID = [[28, 56], [56, 28], [56, 56]]
QWEN_VISION: dict[str, Any] = {
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "intermediate_size": 48,
}
MARKS: dict[str, int] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_MARKS: dict[str, int] = {**MARKS, "vision_start_token_id": 122, "vision_end_token_id": 123}


def _mrope(**more: Any) -> dict[str, Any]:
    # as plain data: the configuration of the text model is built by that of the whole model
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0} | more
    return TEXT | {"rope_parameters": rope}


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llava": lambda: hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    ),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-2, -3, 1],
    ),
    "video_llava": lambda: hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        image_grid_pinpoints=GRID,
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**{name: CLIP[name] for name in CLIP if name != "projection_dim"}),
        text_config=hf.Qwen2Config(**TEXT),
        image_grid_pinpoints=GRID,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        **MARKS,
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        vision_config={**QWEN_VISION, "depth": 3, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config=_mrope(),
        **QWEN_MARKS,
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0, 2],
            "window_size": 56,
        },
        text_config=_mrope(),
        **QWEN_MARKS,
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        vision_config={
            **QWEN_VISION,
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        text_config=_mrope(mrope_interleaved=True),
        **QWEN_MARKS,
    ),
    "internvl": lambda: hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[56, 56],
            patch_size=[7, 7],
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    ),
}
FAMILIES = tuple(CONFIGS)
VIDEOS = ("video_llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def tiny_vlm(family: str = "llava", seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """A model of this family in fp32 and eval mode, wide enough for sharp attention and an image that matters. It never
    emits a placeholder, which transformers could not tell from an image of the prompt."""
    torch.manual_seed(seed)
    return widened(AutoModelForImageTextToText.from_config(CONFIGS[family](), attn_implementation=attention))


def family_for(method: str) -> str:
    """A family that a method works on: one with videos for those that compare frames."""
    return "llava_onevision" if issubclass(list_methods()[method], VideoTokens) else "llava"


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model in fp32 and eval mode, with wide weights, which emits no placeholder and does not end by itself."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.25)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    model.generation_config.eos_token_id = None
    return model.float().eval()


@dataclass(frozen=True)
class Scene:
    """One row of a batch: how many text tokens stand before, between and after its images."""

    text: tuple[int, ...] = (4, 9)
    seed: int = 3

    @property
    def images(self) -> int:
        return len(self.text) - 1


ONE = (Scene(),)
UNEQUAL = (Scene((4, 3, 9), 5), Scene((2, 6), 6))


def pixels(family: str, seed: int) -> dict[str, Any]:
    """What the processor of the family makes of one image; sizes follow the seed where a family has several."""
    generator = torch.Generator().manual_seed(seed)
    if family.startswith("qwen"):
        grid = [1, 4, 8] if seed % 2 else [1, 4, 4]
        count = grid[1] * grid[2]
        values = torch.randn(count, 3 * 2 * 14 * 14, generator=generator)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([grid])}
    if family in ("llava_next", "llava_onevision"):
        values = torch.randn(1, 5, 3, 28, 28, generator=generator)
        return {"pixel_values": values, "image_sizes": torch.tensor([[56, 40]] if seed % 2 else [[28, 50]])}
    side = 56 if family == "internvl" else 28
    values = torch.randn(1, 3, side, side, generator=generator)
    if family == "video_llava":
        names = inspect.signature(AutoModelForImageTextToText._model_mapping[hf.VideoLlavaConfig].forward).parameters
        return {"pixel_values" if "pixel_values" in names else "pixel_values_images": values}
    return {"pixel_values": values}


def frames(family: str, seed: int) -> dict[str, Any]:
    """The same of one video with three frames, or three pairs of frames."""
    generator = torch.Generator().manual_seed(seed)
    if family.startswith("qwen"):
        grid = [3, 4, 4]
        values = torch.randn(math.prod(grid), 3 * 2 * 14 * 14, generator=generator)
        return {"pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}
    return {"pixel_values_videos": torch.randn(1, 3, 3, 28, 28, generator=generator)}


def placeholders(model: PreTrainedModel, image: dict[str, Any]) -> int:
    """Visual tokens of one image or video, as the model itself counts them."""
    return len(features(model, image))


def features(model: PreTrainedModel, image: dict[str, Any]) -> torch.Tensor:
    """What the language model gets in the places of one image or video: [tokens, C]."""
    holder = model.base_model
    if "pixel_values_videos" not in image:
        return torch.cat(list(holder.get_image_features(**image, return_dict=True).pooler_output))
    if model.config.model_type != "llava_onevision" or "pixel_values_videos" in _parameters(holder.get_video_features):
        return torch.cat(list(holder.get_video_features(**image, return_dict=True).pooler_output))
    # older versions add the newline of a video later
    videos = holder.get_video_features(image["pixel_values_videos"], return_dict=True).pooler_output
    return torch.cat([torch.cat([rows, holder.image_newline[None]]) for rows in videos])


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def inputs(model: PreTrainedModel, scenes: Sequence[Scene] = ONE, video: bool = False) -> dict[str, torch.Tensor]:
    """Token ids padded on the left, mask and images of a batch, or videos in their place."""
    family = model.config.model_type
    rows, images = [], []
    for scene in scenes:
        generator = torch.Generator().manual_seed(scene.seed)
        row: list[int] = []
        for place, count in enumerate(scene.text):
            row += torch.randint(3, IMAGE, (count,), generator=generator).tolist()
            if place < scene.images:
                image = (frames if video else pixels)(family, 10 * scene.seed + place)
                images.append(image)
                tokens = [VIDEO if video else IMAGE] * placeholders(model, image)
                if video and family == "qwen3_vl":  # a time stamp stands before each frame
                    tokens = [3, *tokens[: len(tokens) // 3]] * 3
                row += tokens
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for name in images[0] if images else ():
        batch[name] = torch.cat([image[name] for image in images])
    return batch


def decode(model: PreTrainedModel, batch: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding: new token ids [B, 6] and logits [B, 6, vocabulary]."""
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**batch, **(options | changes))
    assert torch.equal(output.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


def require_mode(
    model: PreTrainedModel, batch: dict[str, Any], mode: dict[str, Any], reference: dict[str, Any]
) -> None:
    """Skips where the unpatched model of an older transformers, which encodes images anew in every call, gets a mode
    wrong by itself. The newest one must not."""
    options = {"max_new_tokens": 6, "do_sample": False}
    try:
        fine = torch.equal(model.generate(**batch, **options, **mode), model.generate(**batch, **options, **reference))
    except RuntimeError:
        fine = False
    if not fine:
        assert "mm_encoder_outputs" not in inspect.signature(model.forward).parameters
        pytest.skip(f"the unpatched {model.config.model_type} of this transformers differs under {mode}")
