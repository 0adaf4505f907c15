"""Images whose tokens keep their original positions on three axes, as Qwen's models have them.

vLLM asks for positions before an image has been looked at. They are given as if a method that does not look had chosen;
where one looks, each row carries how far its place is from that one, in columns behind its features, and the
positions of a step are put right in the call that the rows go into. Text keeps its positions whatever stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.integrations.vllm.scores import TowerScores
from llm_accel.integrations.vllm.visual import (
    check_items,
    check_tower,
    choose,
    limits_without_videos,
    pruning,
    visual_method,
)
from llm_accel.methods import TowerCut, TowerTokens, VisualTokens

_HALF = 128  # each distance in two columns, of which bfloat16 holds every number
_COLUMNS = 6


class MropeInfo:
    """Mixed into a family's processing info: counts what enters the language model, and takes images only."""

    ctx: Any

    def get_num_image_tokens(self, **size: Any) -> int:
        count = super().get_num_image_tokens(**size)  # type: ignore[misc]
        method = visual_method(self.ctx.model_config)
        return count if method is None else method.tokens(count)

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return limits_without_videos(super().get_supported_mm_limits(), self.ctx.model_config)  # type: ignore[misc]


class MropeProcessor:
    """Mixed into a family's processor: as many placeholders as the method keeps."""

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(mm_items, *args, **kwargs)  # type: ignore[misc]
        method = visual_method(self.info.ctx.model_config)  # type: ignore[attr-defined]
        check_items(method, mm_items)
        return updates if method is None else [_fewer(one, method) for one in updates if one.modality == "image"]


def _fewer(update: Any, method: VisualTokens) -> Any:
    usual = update.replacement

    def replacement(index: int) -> list[int]:
        full: list[int] = usual(index)
        return full[: method.tokens(len(full))]

    return replace(update, replacement=replacement)


class MropeModel:
    """Mixed into a family's model.

    Attributes:
        method: the visual method, or None.
        visual: the vision tower.
    """

    method: VisualTokens | None
    config: Any
    visual: Any
    _scores: TowerScores | None = None
    _shift: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with pruning():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.method = method = visual_method(vllm_config.model_config)
        if method is None:
            return
        if method.positions == "compact":
            raise ConfigError(
                f"{method.spec()} cannot run in this engine: positions have three axes here; leave it out."
            )
        if getattr(self, "is_multimodal_pruning_enabled", False):
            raise ConfigError(f"{method.spec()} cannot run in this engine: leave video_pruning_rate out.")
        wrong = {
            "with pipeline parallelism later stages do not see what the image told": (
                vllm_config.parallel_config.pipeline_parallel_size > 1
            ),
            "speculative decoding gives the same rows to another model": vllm_config.speculative_config is not None,
            "patches leave behind this tower, in one stage; give tower_stage=behind,llm_stage=off": (
                isinstance(method, TowerCut) and method.inside
            ),
        }
        check_tower(method, vllm_config, wrong)
        if isinstance(method, TowerTokens):
            layers = {index: self.visual.blocks[index].attn.attn for index in self.looked_at}
            self._scores = TowerScores(
                method, layers, len(self.visual.blocks) - 1, class_token=False, heads=self._images
            )

    @property
    def looked_at(self) -> Sequence[int]:
        """Layers of the tower in which each patch sees the whole image; others may see windows of it."""
        return sorted(getattr(self.visual, "fullatt_block_indexes", range(len(self.visual.blocks))))

    def _raster(self, marks: Tensor, grids: list[list[int]]) -> Tensor:
        """What the tower knows of each token, [n, c], in the order of its output: with windows, it works in theirs."""
        if not hasattr(self.visual, "fullatt_block_indexes"):
            return marks
        order: Tensor = self.visual.prepare_encoder_metadata(grids)["reverse_indices"]
        return marks[order.to(marks.device, torch.int64)]

    def _images(self, module: Any, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Query, key and value of each image or pair of frames, from [1, S, h, d] of all."""
        parts = [one[0].transpose(0, 1).split(self._sizes, dim=1) for one in tensors]
        for query, key, value in zip(*parts, strict=True):
            yield query[None], key[None], value[None]

    def _process_image_input(self, image_input: Any) -> Any:
        method = self.method
        if method is None:
            return super()._process_image_input(image_input)  # type: ignore[misc]
        grids = [[int(side) for side in grid] for grid in image_input["image_grid_thw"]]
        marks = None
        if self._scores is not None:
            embeds, known = self._scored(self._scores, image_input, grids)
            marks = known.split([len(one) for one in embeds])
        else:
            embeds = super()._process_image_input(image_input)  # type: ignore[misc]
        vision = self.config.vision_config
        rows, kept = choose(method, embeds, marks, getattr(vision, "out_hidden_size", vision.hidden_size))
        if marks is None:
            return tuple(rows)
        return tuple(self._placed(*one, method) for one in zip(rows, kept, grids, strict=True))

    def _scored(self, scores: TowerScores, image_input: Any, grids: list[list[int]]) -> tuple[Any, Tensor]:
        """Features of each image, and what the tower knows of each token of all, [n, c]."""
        self._sizes = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        with scores.running() as running:
            embeds = super()._process_image_input(image_input)  # type: ignore[misc]
        patches = torch.cat(running.values())
        unit = self.visual.spatial_merge_size**2
        return embeds, self._raster(patches.view(-1, unit, patches.shape[-1]).mean(1), grids)

    def _grid(self, grid: Sequence[int]) -> Tensor:
        """Places of an image's tokens within it: int64 [3, n]."""
        merge = self.visual.spatial_merge_size
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        sides = [torch.arange(side) for side in (frames, rows, columns)]
        return torch.stack([one.flatten() for one in torch.meshgrid(*sides, indexing="ij")])

    def _blind(self, count: int, method: VisualTokens) -> Tensor:
        """What stays of an image that nobody has looked at; of a method that looks, any choice of as many."""
        if isinstance(method, TowerTokens):
            return torch.arange(method.tokens(count))
        return method.choose(count, None, torch.device("cpu"))

    def _placed(self, rows: Tensor, kept: Tensor, grid: list[int], method: VisualTokens) -> Tensor:
        """Rows [n, C] with the distance of each from where it is taken to be, in six columns."""
        places = self._grid(grid)
        away = places[:, kept.cpu()] - places[:, self._blind(places.shape[1], method)]
        columns = torch.cat([away // _HALF, away % _HALF]).T
        return torch.cat([rows, columns.to(rows)], dim=1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, n] of a prompt, and how far those of the reply are from its length."""
        if self.method is None:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
            return found
        pieces, done, following = [], 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            offset = feature.mm_position.offset
            places = self._grid(feature.data["image_grid_thw"].data.tolist())
            pieces.append(_text(offset - done) + following)
            following += offset - done
            pieces.append(places[:, self._blind(places.shape[1], self.method)] + following)
            following += int(places.max()) + 1
            done = offset + feature.mm_position.length
        pieces.append(_text(len(input_tokens) - done) + following)
        return torch.cat(pieces, dim=1), following - done

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Rows of a step. What the columns behind the features say is kept for the call that they go into."""
        self._shift = None
        if isinstance(self.method, TowerTokens) and multimodal_embeddings and is_multimodal is not None:
            columns = torch.cat([one[:, -_COLUMNS:] for one in multimodal_embeddings]).long()
            away = columns[:, :3] * _HALF + columns[:, 3:]
            self._shift = is_multimodal.nonzero()[:, 0].to(away.device), away.T
            multimodal_embeddings = [one[:, :-_COLUMNS] for one in multimodal_embeddings]
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's call; positions [3, n] are put right in place, because graphs of the layers read that memory."""
        shift, self._shift = self._shift, None
        if shift is not None:
            rows, away = shift
            positions.index_add_(1, rows.to(positions.device), away.to(positions))
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def get_encoder_cudagraph_config(self) -> Any:
        """Graphs of the tower would leave out what happens here."""
        usual = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return usual if self.method is None else replace(usual, modalities=[])


def _text(count: int) -> Tensor:
    return torch.arange(count).expand(3, -1)
