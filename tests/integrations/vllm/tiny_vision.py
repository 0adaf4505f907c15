"""Tiny random vision-language models with processors, on disk, for vLLM and transformers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.integrations.vllm.kit import TINY

IMAGE, VIDEO, START, END = 120, 121, 122, 123
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
INTERNVL = {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END}
LLAVA = {"<image>": IMAGE, "<video>": VIDEO, "<unused1>": START, "<unused2>": END}
SPECIAL = {"internvl": INTERNVL, "llava_next": LLAVA, "llava_onevision": LLAVA}
"""The tokens of images and videos; those of Qwen's where a family is missing."""
SIZES = ((112, 112), (168, 112), (112, 196), (224, 140), (140, 224), (56, 280))
TILED_SIZES = ((56, 28), (28, 56), (56, 50), (112, 112), (100, 60), (28, 28))
"""Of 28 pixels a tile; the fourth is so large that LLaVA-OneVision makes it smaller behind the projector."""
PINPOINTS = [[28, 56], [56, 28], [56, 56], [112, 56], [112, 112]]
TEXT: dict[str, Any] = TINY | {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0} | more}


def configuration(family: str) -> hf.PretrainedConfig:
    """``qwen2_vl``, ``qwen2_5_vl``, ``qwen3_vl``, ``llava_next``, ``llava_onevision`` or ``internvl``."""
    if family == "qwen2_vl":
        tower = TOWER | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
        return hf.Qwen2VLConfig(vision_config=tower, text_config=TEXT | _rope(), **MARKS)
    if family == "qwen2_5_vl":
        tower = TOWER | {"fullatt_block_indexes": [1, 3], "window_size": 56}
        return hf.Qwen2_5_VLConfig(vision_config=tower, text_config=TEXT | _rope(), **MARKS)
    if family == "qwen3_vl":
        tower = TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        return hf.Qwen3VLConfig(vision_config=tower, text_config=TEXT | _rope(mrope_interleaved=True), **MARKS)
    if family == "llava_next":
        return hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(**CLIP, projection_dim=64),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    if family == "llava_onevision":
        return hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**CLIP),
            text_config=hf.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
        )
    tower = CLIP | {"num_hidden_layers": 3, "image_size": [56, 56], "patch_size": [7, 7]}
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**tower),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


def save(family: str, folder: Path) -> Path:
    """Writes the model; every weight is drawn wide, so that images matter."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(configuration(family), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 1.2 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    _processor(family).save_pretrained(folder)
    return folder


def special(family: str) -> dict[str, int]:
    """The tokens that stand for images and videos."""
    return SPECIAL.get(family, QWEN)


def _tokenizer(family: str) -> Any:
    marks = special(family)
    words = {f"w{one}": one for one in range(128) if one not in marks.values()} | marks
    words = {
        "<pad>" if one == 0 else "<s>" if one == 1 else "</s>" if one == 2 else name: one for name, one in words.items()
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(marks))
    image, video, start, end = marks
    named = {
        "qwen": {"image_token": image, "video_token": video, "vision_bos_token": start, "vision_eos_token": end},
        "internvl": {
            "start_image_token": start, "end_image_token": end, "context_image_token": image, "video_token": video,
        },
        "llava": {"image_token": image, "video_token": video},
    }  # fmt: skip
    more = next(tokens for name, tokens in named.items() if family.startswith(name))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=more
    )


def _processor(family: str) -> Any:
    fast = _tokenizer(family)
    if family == "llava_next":
        sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        images = hf.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS)
        return hf.LlavaNextProcessor(
            images, fast, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if family == "llava_onevision":
        sizes = {"size": {"height": 28, "width": 28}}
        images = hf.LlavaOnevisionImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS)
        video = hf.LlavaOnevisionVideoProcessor(**sizes)
        return hf.LlavaOnevisionProcessor(
            images, fast, video, num_image_tokens=16, vision_feature_select_strategy="full"
        )
    if family == "internvl":
        sizes = {"size": {"height": 56, "width": 56}}
        images = hf.GotOcr2ImageProcessor(**sizes, crop_to_patches=True, min_patches=1, max_patches=4)
        return hf.InternVLProcessor(images, fast, hf.InternVLVideoProcessor(**sizes), image_seq_length=16)
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    grid = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "size": sizes}
    images = hf.Qwen2VLImageProcessor(**grid)
    if family == "qwen2_vl":
        return hf.Qwen2VLProcessor(images, fast, hf.Qwen2VLVideoProcessor(**grid))
    if family == "qwen2_5_vl":
        return hf.Qwen2_5_VLProcessor(images, fast, hf.Qwen2VLVideoProcessor(**grid))
    return hf.Qwen3VLProcessor(images, fast, hf.Qwen3VLVideoProcessor(**grid))


def prompts(family: str, count: int = 24, pairs: int = 3) -> list[tuple[str, list[Image.Image]]]:
    """Texts with an image each, tall and wide ones among them, and some with two images."""
    image, _, start, end = special(family)
    mark, unit, sizes = (f"{start} {image} {end}", 14, SIZES) if family.startswith("qwen") else (image, 4, TILED_SIZES)
    draw, found = np.random.default_rng(0), []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        pixels = draw.integers(0, 255, (height // unit, width // unit, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        before, after = (
            " ".join(f"w{one}" for one in draw.integers(3, 118, draw.integers(2, most))) for most in (6, 12)
        )
        found.append((f"{before} {mark} {after}", [picture]))
    both = [(found[one][0] + " " + found[one + 1][0], found[one][1] + found[one + 1][1]) for one in range(count - 1)]
    return found + both[: 2 * pairs : 2]
