"""Tiny models of vision-language families, most of them not declared, with one image that fits each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_vlm import IMAGE, widened
from tests.vlm_others import OTHERS
from tests.vlm_towers import TOWERS

CONFIGS = {**OTHERS, **TOWERS}


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
    return {
        name: value for name, value in batch.items() if not name.endswith(("_ids", "attention_mask")) or "pixel" in name
    }
