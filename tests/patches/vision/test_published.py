"""The same tokens as the released procedures choose, on random towers of several depths and sizes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

import llm_accel
from llm_accel import FlowCut, VisionZip
from tests.tiny_vlm import CLIP, TEXT
from tests.vision_oracle import flowcut, published_visionzip

TOWERS = [pytest.param(*case, id="-".join(map(str, case))) for case in product((6, 12, 24), (12, 24), range(6))]


def random_tower(layers: int, side: int, seed: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """A LLaVA whose tower has so many layers and ``side`` x ``side`` patches, and an image of noise."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**(CLIP | {"num_hidden_layers": layers, "image_size": 7 * side}))
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=120, image_seq_length=side * side
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model, torch.randn(3, 7 * side, 7 * side)


@torch.no_grad()
@pytest.mark.parametrize(("layers", "side", "seed"), TOWERS)
def test_kept_tokens(layers: int, side: int, seed: int) -> None:
    """At a third and at a ninth: FlowCut's patches; VisionZip's dominant and contextual tokens, by their features."""
    model, image = random_tower(layers, side, seed)
    for share in (3, 9):
        budget = side * side // share
        with llm_accel.apply(model, FlowCut(budget=budget)):
            kept = ~model.model.get_image_features(image[None], return_dict=True).pooler_output[0][:, -1].isnan()
        assert kept.nonzero()[:, 0].tolist() == flowcut(model, image, budget)[0].tolist()
        dominant, contextual = budget - budget // 6, budget // 6
        published, best, targets = published_visionzip(model, image, dominant, contextual)
        places = [row - 1 for row in (*best[1:], *targets)]
        method = VisionZip(dominant=dominant, contextual=contextual, positions="original")
        with llm_accel.apply(model, method):
            features = model.model.get_image_features(image[None], return_dict=True).pooler_output[0]
        found = (~features[:, -1].isnan()).nonzero()[:, 0].tolist()
        spare = set(found) - set(places)
        assert len(found) == budget and len(spare) == 1
        assert torch.allclose(features[[*spare, *places]], published, atol=1e-4)
