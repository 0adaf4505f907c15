"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL with processors, on disk, for vLLM and transformers alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

IMAGE, VIDEO, START, END = 120, 121, 122, 123
SPECIAL = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
SIZES = ((112, 112), (168, 112), (112, 196), (224, 140), (140, 224), (56, 280))
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0} | more}


def configuration(family: str) -> hf.PretrainedConfig:
    """``qwen2_vl``, ``qwen2_5_vl`` or ``qwen3_vl``."""
    if family == "qwen2_vl":
        tower = TOWER | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
        return hf.Qwen2VLConfig(vision_config=tower, text_config=TEXT | _rope(), **MARKS)
    if family == "qwen2_5_vl":
        tower = TOWER | {"fullatt_block_indexes": [1, 3], "window_size": 56}
        return hf.Qwen2_5_VLConfig(vision_config=tower, text_config=TEXT | _rope(), **MARKS)
    tower = TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return hf.Qwen3VLConfig(vision_config=tower, text_config=TEXT | _rope(mrope_interleaved=True), **MARKS)


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


def _processor(family: str) -> Any:
    words = {f"w{one}": one for one in range(128) if one not in SPECIAL.values()} | SPECIAL
    words = {
        "<pad>" if one == 0 else "<s>" if one == 1 else "</s>" if one == 2 else name: one for name, one in words.items()
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    grid = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "size": sizes}
    images = hf.Qwen2VLImageProcessor(**grid)
    if family == "qwen2_vl":
        return hf.Qwen2VLProcessor(images, fast, hf.Qwen2VLVideoProcessor(**grid))
    if family == "qwen2_5_vl":
        return hf.Qwen2_5_VLProcessor(images, fast, hf.Qwen2VLVideoProcessor(**grid))
    return hf.Qwen3VLProcessor(images, fast, hf.Qwen3VLVideoProcessor(**grid))


def prompts(count: int = 24) -> list[tuple[str, list[Image.Image]]]:
    """Texts with an image each, tall and wide ones among them, and three with two images."""
    draw, found = np.random.default_rng(0), []
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        pixels = draw.integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        before, after = (
            " ".join(f"w{one}" for one in draw.integers(3, 118, draw.integers(2, most))) for most in (6, 12)
        )
        found.append((f"{before} <|vision_start|> <|image_pad|> <|vision_end|> {after}", [image]))
    pairs = [(found[one][0] + " " + found[one + 1][0], found[one][1] + found[one + 1][1]) for one in (0, 2, 4)]
    return found + pairs
