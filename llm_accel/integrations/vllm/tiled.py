"""Images that are cut into tiles: LLaVA-NeXT and LLaVA-OneVision, whose tiles are put together again behind the
projector, and InternVL, each tile of which is an image of its own.

vLLM counts positions with one axis from 0 without gaps, so what stays is where ``positions="compact"`` puts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from math import isqrt
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.siglip import SiglipVisionModel

from llm_accel.integrations.vllm.scores import TowerScores, joined_heads
from llm_accel.integrations.vllm.visual import (
    check_items,
    check_tower,
    choose,
    limits_without_videos,
    pruning,
    visual_method,
)
from llm_accel.methods import TowerCut, TowerTokens, VisualTokens
from llm_accel.patches.families import FAMILIES
from llm_accel.patches.families.qwen import blocks_of


class PackedInfo:
    """LLaVA-NeXT, LLaVA-OneVision. Tokens that end a line are not counted: they go with the first patch that does, or
    stay."""

    ctx: Any

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return limits_without_videos(super().get_supported_mm_limits(), self.ctx.model_config)  # type: ignore[misc]

    def _get_num_unpadded_features(self, *, npatches: int, **sizes: int) -> tuple[int, int]:
        tiles, lines = super()._get_num_unpadded_features(npatches=npatches, **sizes)  # type: ignore[misc]
        method = visual_method(self.ctx.model_config)
        if method is None:
            return tiles, lines
        whole = npatches**2  # the copy of the whole image, to which the caller adds these
        kept = method.tokens(whole + tiles)
        return kept - whole, lines if kept == whole + tiles or method.newline == "keep" else 0

    def get_image_size_with_most_features(self) -> Any:
        """The image that costs the tower most, whatever stays of it."""
        return self._dense.get_image_size_with_most_features()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """At least as many as stay of any image: another than the largest may have more lines."""
        method = visual_method(self.ctx.model_config)
        if method is None or not mm_counts.get("image"):
            found: Mapping[str, int] | None = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
            return found
        usual = self._dense
        size, encoder = usual.get_image_size_with_most_features(), usual.get_vision_encoder_info()
        most = usual.get_num_image_tokens(image_width=size.width, image_height=size.height)
        tiles = max(height for height, _ in usual.get_hf_config().image_grid_pinpoints) // encoder.get_image_size()
        return {"image": min(most, method.tokens(most) + tiles * encoder.get_patch_grid_length())}

    @property
    def _dense(self) -> Any:
        """vLLM's own processing info, which knows no method."""
        return type(self).__bases__[1](self.ctx)


class PackedProcessor:
    """Takes images only."""

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        check_items(visual_method(self.info.ctx.model_config), mm_items)  # type: ignore[attr-defined]
        return super()._get_prompt_updates(mm_items, *args, **kwargs)  # type: ignore[misc]


class TileInfo:
    """InternVL."""

    ctx: Any

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return limits_without_videos(super().get_supported_mm_limits(), self.ctx.model_config)  # type: ignore[misc]

    def get_num_image_tokens(self, *, processor: Any, **given: Any) -> int:
        count: int = super().get_num_image_tokens(processor=processor, **given)  # type: ignore[misc]
        method = visual_method(self.ctx.model_config)
        own: int = processor.image_seq_length
        return count if method is None else count // own * method.tokens(own)


class TileProcessor:
    """InternVL: as many placeholders as the method keeps of each tile."""

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, *args, **kwargs)  # type: ignore[misc]
        method = visual_method(self.info.ctx.model_config)  # type: ignore[attr-defined]
        check_items(method, mm_items)
        if method is None:
            return updates
        processor = self.info.get_hf_processor()  # type: ignore[attr-defined]
        own, placeholder = processor.image_seq_length, processor.image_token_id
        return [_fewer(one, method, own, placeholder) for one in updates if one.modality == "image"]


def _fewer(update: Any, method: VisualTokens, own: int, placeholder: int) -> Any:
    usual = update.replacement

    def replacement(index: int) -> Any:
        full = usual(index)
        count = full.full.count(placeholder)
        kept = count // own * method.tokens(own)
        begin = full.full.index(placeholder)
        return replace(full, full=[*full.full[: begin + kept], *full.full[begin + count :]])

    return replace(update, replacement=replacement)


class TiledModel:
    """Mixed into the models.

    Attributes:
        method: the visual method, or None.
    """

    method: VisualTokens | None
    config: Any
    vision_tower: Any
    _scores: TowerScores | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with pruning():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.method = method = visual_method(vllm_config.model_config)
        family = FAMILIES[self.config.model_type]
        wrong = {
            "patches would leave inside the tower, and of those that stay the model cuts off what lies in an image's "
            "padding: how many are left is not known before, and vLLM must know": family.prunable,
            "patches leave behind this tower; give tower_stage=behind": (
                family.cuttable({}) and isinstance(method, TowerCut) and method.inside
            ),
        }
        check_tower(method, vllm_config, wrong | self._wrong())
        if isinstance(method, TowerTokens):
            layers = dict(enumerate(self._attentions()))
            self._scores = TowerScores(method, layers, len(layers) - 1, family.class_token, joined_heads)

    def _wrong(self) -> dict[str, bool]:
        """Further reasons why a method cannot look into the tower, and whether they hold."""
        return {}

    def _attentions(self) -> list[Any]:
        """The attention modules of the tower's layers, down to the one whose output is used."""
        raise NotImplementedError


class PackedModel(TiledModel):
    """LLaVA-NeXT, LLaVA-OneVision."""

    def _wrong(self) -> dict[str, bool]:
        return {
            "only the attention of SigLIP towers is known": not isinstance(self.vision_tower, SiglipVisionModel),
            "the features come from several layers of the tower": not isinstance(self.config.vision_feature_layer, int),
        }

    def _attentions(self) -> list[Any]:
        return [layer.self_attn.attn for layer in self.vision_tower.vision_model.encoder.layers]

    def _process_image_input(self, image_input: Any) -> Any:
        method = self.method
        if method is None:
            return super()._process_image_input(image_input)  # type: ignore[misc]
        tiles = [len(pixels) for pixels in image_input["pixel_values"]]
        if self._scores is None:
            embeds = super()._process_image_input(image_input)  # type: ignore[misc]
            vision = self.config.vision_config
            known = torch.zeros(sum(tiles), (vision.image_size // vision.patch_size) ** 2, 1, device=embeds[0].device)
        else:
            with self._scores.running() as tower:
                embeds = super()._process_image_input(image_input)  # type: ignore[misc]
            known = torch.stack(tower.values())
        marks = self._packed(known.split(tiles), image_input["image_sizes"])
        return choose(method, embeds, marks, embeds[0].shape[-1])[0]

    def _packed(self, known: Sequence[Tensor], sizes: Tensor) -> list[Tensor]:
        """What is known of patches, fp32 [tiles, patches, c] of each image, as they stand among its tokens: through the
        model's own packing, with NaN for tokens that end a line."""
        packing = super()._merge_image_patch_embeddings.__func__  # type: ignore[misc]
        newline = torch.full((known[0].shape[-1],), torch.nan, device=known[0].device)
        stand_in = SimpleNamespace(config=self.config, image_newline=newline)
        given = {"image_newline": newline} if "image_newline" in signature(packing).parameters else {}
        return [
            packing(stand_in, size, one, strategy="spatial_unpad", **given)
            for size, one in zip(sizes, known, strict=True)
        ]


class TileModel(TiledModel):
    """InternVL: blocks of patches of a tile are shuffled into one token, line by line of blocks."""

    def _attentions(self) -> list[Any]:
        return [layer.attention.attn for layer in self.vision_tower.encoder.layer]

    def _process_vision_input(self, image_input: Any) -> Any:
        method = self.method
        if method is None:
            return super()._process_vision_input(image_input)  # type: ignore[misc]
        tiles = [int(count) for count in image_input["num_patches"]]
        marks = None
        if self._scores is None:
            embeds = super()._process_vision_input(image_input)  # type: ignore[misc]
        else:
            with self._scores.running() as tower:
                embeds = super()._process_vision_input(image_input)  # type: ignore[misc]
            side = round(1 / self.config.downsample_ratio)
            marks = [blocks_of(one, isqrt(len(one)), side) for one in tower.values()]
        parts = torch.cat(list(embeds)).chunk(sum(tiles))
        rows, _ = choose(method, parts, marks, parts[0].shape[-1])
        return torch.cat(rows).split([count * len(rows[0]) for count in tiles])
