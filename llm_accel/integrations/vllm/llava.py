"""LLaVA-1.5: the processor announces what the method keeps, and patches leave inside the CLIP tower.

vLLM counts positions with one axis from 0 without gaps, so what stays is where ``positions="compact"`` puts it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.pixtral import PixtralHFVisionModel
from vllm.multimodal import MULTIMODAL_REGISTRY

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.visual import PLAIN_TOWER, check_items, check_tower, pruning, visual_method
from llm_accel.methods import TowerCut, TowerTokens
from llm_accel.patches.vision.tower import TowerPass


class AccelLlavaInfo(LlavaProcessingInfo):
    """Counts the visual tokens that enter the language model."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        count = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        method = visual_method(self.ctx.model_config)
        return count if method is None else method.tokens(count)


class AccelLlavaProcessor(LlavaMultiModalProcessor):
    """Takes images only."""

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        check_items(visual_method(self.info.ctx.model_config), mm_items)
        return super()._get_prompt_updates(mm_items, *args, **kwargs)


def _info(ctx: Any) -> Any:
    usual = _build_llava_or_pixtral_hf_info(ctx)
    return AccelLlavaInfo(ctx) if type(usual) is LlavaProcessingInfo else usual  # Pixtral towers: as before


def _processor(info: Any, dummy_inputs: Any, **more: Any) -> Any:
    if isinstance(info, AccelLlavaInfo):
        return AccelLlavaProcessor(info, dummy_inputs, **more)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs, **more)


class ClipPass(TowerPass):
    """A pass of images through vLLM's CLIP tower."""

    def through(self, tower: Any, pixels: Tensor) -> Tensor:
        """Features of images [B, 3, H, W] after the last layer that there is: [B, rows, C], those that left being 0."""
        hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels))
        for index, layer in enumerate(tower.encoder.layers):
            attention = layer.self_attn
            qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden))
            heads = qkv.unflatten(-1, (3, attention.num_heads_per_partition, -1)).permute(2, 0, 3, 1, 4)
            mixed = self._attended(heads[0], heads[1], heads[2], attention.scale)
            hidden = hidden + attention.out_proj(mixed)[0]
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            hidden = self.after(index, hidden)
        if tower.post_layernorm is not None:
            hidden = tower.post_layernorm(hidden)
        return hidden

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.see(query, key, value, scaling)
        mask = None if self.mask is None else self.mask[:, None, None]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        rows: Tensor = output.transpose(1, 2).flatten(2)
        return rows


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=LlavaDummyInputsBuilder)
class AccelLlava(LlavaForConditionalGeneration):
    """Loads and runs as the class whose place it takes; the features of images are fewer."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | PLAIN_TOWER

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with pruning():
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.method = visual_method(vllm_config.model_config)
        if self.method is not None and isinstance(self.vision_tower, PixtralHFVisionModel):
            raise ConfigError(f"{self.method.spec()} cannot run in this engine: Pixtral towers mark each line's end.")
        layers = self.config.vision_feature_layer
        check_tower(
            self.method,
            vllm_config,
            {
                "only the attention of CLIP towers is known": not isinstance(self.vision_tower, CLIPVisionModel),
                "the features come from several layers of the tower": not isinstance(layers, int),
                "patches leave inside this tower; leave out tower_stage=behind": isinstance(self.method, TowerCut)
                and not self.method.inside,
            },
        )

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        method = self.method
        if method is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        if not isinstance(method, TowerTokens):
            features = super()._image_pixels_to_features(vision_tower, pixel_values)
            return features[:, method.choose(features.shape[1], None, features.device)]
        tower = vision_tower.vision_model
        running = ClipPass(
            method,
            class_token=True,
            last=len(tower.encoder.layers) - 1,  # vLLM builds no more layers than the features need
            inside=True,
            parts=None,
            layers=None,
            keeps_class=self.config.vision_feature_select_strategy == "full",
            renumbers=True,
        )
        hidden = running.through(tower, pixel_values)
        rows = hidden if running.keeps_class else hidden[:, 1:]
        stayed = torch.stack(running.values())[..., 0] > 0.5
        return rows[stayed].view(len(rows), -1, rows.shape[-1])
