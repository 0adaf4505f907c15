"""What a family of vision-language models must declare before visual tokens can be taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class VisionFamily:
    """One family. Paths are attribute names from the model that holds ``get_image_features``, joined by dots.

    Attributes:
        model_type: name of the family in transformers.
        tower: path of the vision tower.
        blocks: path of its layers, from the tower.
        class_token: whether the tower puts a class token first.
        prunable: whether the tower may lose patches half-way, which leaves the number of its outputs to be restored.
        merge: patches that are merged into one visual token, and so stay or go together.
        token_ids: attributes of the configuration that name the placeholders of visual tokens.
    """

    model_type: str
    tower: str = "vision_tower"
    blocks: str = "encoder.layers"
    class_token: bool = True
    prunable: bool = True
    merge: int = 1
    token_ids: tuple[str, ...] = ("image_token_id",)

    def tiles(self, model: Any, call: dict[str, Any]) -> list[int] | None:
        """Tiles that each image of a call of ``get_image_features`` is cut into; None: one each."""
        return None

    def full_blocks(self, model: Any) -> tuple[int, ...] | None:
        """Layers of the tower in which each patch sees the whole image; None: all of them."""
        return None

    def patches(self, model: Any, call: dict[str, Any], features: Sequence[Tensor]) -> list[int]:
        """Patches of each tile, for the ``features`` of each image that the call returned."""
        return [len(one) * self.merge for one in features]

    def packed(self, model: Any, call: dict[str, Any], values: Sequence[Tensor]) -> list[Tensor]:
        """Numbers of single patches as they stand among the visual tokens of each image, the mean where several patches
        are one token.

        Args:
            model: the model that holds ``get_image_features``.
            call: arguments of that call, by name.
            values: fp32 [patches] of each tile.

        Returns:
            One fp32 [tokens] per image; NaN where a visual token is no patch, as in rows that mark a line's end.
        """
        return [one.view(-1, self.merge).mean(-1) for one in values]

    def first_cut(self, config: Any) -> int:
        """The first decoder layer after which visual tokens may leave."""
        return 0


def attribute(model: Any, path: str) -> Any:
    """The attribute at the end of a dotted path."""
    for name in path.split("."):
        model = getattr(model, name)
    return model
