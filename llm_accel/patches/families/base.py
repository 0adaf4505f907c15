"""What a family of vision-language models must declare before visual tokens can be taken out of it. Frames of a video,
or the pairs of frames that a tower takes together, are images of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_accel.methods import Downsample
from llm_accel.patches.families.resizing import Places


@dataclass(frozen=True)
class VisionFamily:
    """One family. Paths are attribute names from the model that holds ``get_image_features``, joined by dots.

    Attributes:
        model_type: name of the family in transformers.
        tower: path of the vision tower.
        video_tower: path of the one for videos, where it is another.
        blocks: path of its layers, from the tower.
        class_token: whether the tower puts a class token first.
        prunable: whether the tower may lose patches half-way, which leaves the number of its outputs to be restored.
        packed_rows: whether the patches of all images stand in one row, in whose layers an argument says where images
            or windows end; then whole tokens may leave half-way.
        mergers: paths of the modules, from the tower, that turn patches that follow one another into one;
            ``packed_rows`` only.
        pads: whether the tower fills up smaller images with rows that no other row sees, which ``packed`` leaves out.
        merge: patches that are merged into one visual token, and so stay or go together.
        token_ids: attributes of the configuration that name the placeholders of visual tokens.
        two_stages: whether FlowCut was released for such models with a second stage for images of any size.
        resizable: whether the tower takes images of other sizes than that of its position embeddings.
        axes: of a position in the language model.
        declared: whether the family is declared here; otherwise only methods that need no tower work.
    """

    model_type: str
    tower: str = "vision_tower"
    video_tower: str | None = None
    blocks: str = "encoder.layers"
    class_token: bool = True
    prunable: bool = True
    pads: bool = False
    packed_rows: bool = False
    mergers: tuple[str, ...] = ()
    merge: int = 1
    token_ids: tuple[str, ...] = ("image_token_id",)
    two_stages: bool = False
    resizable: bool = False
    axes: int = 1
    declared: bool = True

    @property
    def towers(self) -> tuple[str, ...]:
        """Paths of all vision towers."""
        return (self.tower,) if self.video_tower is None else (self.tower, self.video_tower)

    def merging(self, tower: Any) -> list[Any]:
        """The modules of ``mergers``, those of a list one by one."""
        found = [attribute(tower, path) for path in self.mergers]
        return [one for module in found for one in (module if isinstance(module, nn.ModuleList) else [module])]

    def cuttable(self, call: dict[str, Any]) -> bool:
        """Whether the tower may lose whole tokens half-way in this call, each with all of its patches."""
        return self.prunable or self.packed_rows

    def units(self, model: Any, call: dict[str, Any], sizes: Sequence[int]) -> list[Tensor]:
        """Which patches make each token: one int64 [tokens, patches of a token] for each tile or frame.

        Args:
            model: the model that holds ``get_image_features``.
            call: arguments of the call by name.
            sizes: patches of each tile or frame.
        """
        return [torch.arange(size).view(-1, self.merge) for size in sizes]

    def tiles(self, model: Any, call: dict[str, Any]) -> list[int] | None:
        """Tiles that each image of a call is cut into; None: one each."""
        return None

    def full_blocks(self, model: Any) -> tuple[int, ...] | None:
        """Layers of the tower in which each patch sees the whole image; None: all of them."""
        return None

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        """Patches of each tile or frame, for the ``features`` of each image or video that the call returned."""
        return [len(one) * self.merge for one in features]

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        """Numbers of single patches as they stand among the visual tokens of each image, the mean where several patches
        are one token.

        Args:
            model: the model that holds ``get_image_features``.
            call: arguments of that call, or of one of ``get_video_features``, by name.
            values: fp32 [patches, c] of each tile or frame.

        Returns:
            One fp32 [tokens, c] per image or frame; NaN where a token is no patch, as in rows that mark a line's end.
        """
        units = self.units(model, call, [len(one) for one in values])
        return [one[unit.to(one.device)].mean(1) for one, unit in zip(values, units, strict=True)]

    def smaller(self, model: Any, call: dict[str, Any], method: Downsample) -> tuple[dict[str, Any], Sequence[Places]]:
        """What the call becomes with smaller images, and the places of the tokens of each. Only where ``resizable``."""
        raise NotImplementedError

    def keeps_class(self, model: Any, call: dict[str, Any]) -> bool:
        """Whether the class token becomes a visual token in this call."""
        given = call.get("vision_feature_select_strategy")
        strategy = given or getattr(model.config, "vision_feature_select_strategy", None)
        return self.class_token and strategy == "full"

    def first_cut(self, config: Any) -> int:
        """The first decoder layer after which visual tokens may leave: the last to which deeper features are added."""
        return len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())


def pixels_of(call: dict[str, Any]) -> str:
    """Which argument of a call of a feature function holds the pixels."""
    names = ("pixel_values", "pixel_values_images", "pixel_values_videos")
    return next(name for name in names if call.get(name) is not None)


def shows_video(call: dict[str, Any]) -> bool:
    """Whether it is a call of ``get_video_features``."""
    return pixels_of(call) == "pixel_values_videos"


def video_lengths(call: dict[str, Any], features: Any, total: int) -> list[int]:
    """Rows of each video among the ``total`` rows of ``features``, which a call of ``get_video_features`` returned."""
    grids, pixels = call.get("video_grid_thw"), call[pixels_of(call)]
    shares = [1] * len(pixels) if grids is None else [int(size) for size in grids.prod(-1)]
    if not (torch.is_tensor(features) and features.ndim == 2) and len(features) == len(shares):
        return [one.shape[:-1].numel() for one in features]
    return [share * total // sum(shares) for share in shares]


def attribute(model: Any, path: str) -> Any:
    """The attribute at the end of a dotted path."""
    for name in path.split("."):
        model = getattr(model, name)
    return model
