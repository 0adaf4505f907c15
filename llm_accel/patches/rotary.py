"""The model's own rotary embedding, for keys whose position in the cache changes."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor


class Rotary:
    """Turns keys to and from positions with the functions of the model's own file, whatever their layout."""

    def __init__(self, decoder: Any) -> None:
        self.embedding = decoder.rotary_emb
        self.apply = sys.modules[type(decoder).__module__].apply_rotary_pos_emb

    def turn(self, key: Tensor, positions: Tensor) -> Tensor:
        """Unrotated keys [B, H, P, D] as they stand at ``positions``, int64 [B, P]."""
        cos, sin = self.embedding(key, positions)
        turned: Tensor = self.apply(key, key, cos, sin)[1]
        return turned

    def turn_back(self, key: Tensor, positions: Tensor) -> Tensor:
        """Keys [B, H, P, D] rotated at ``positions``, int64 [B, P], without their rotation."""
        cos, sin = self.embedding(key, positions)
        scale = (cos.float() ** 2 + sin.float() ** 2).mean()  # the attention factor of long-context variants, squared
        turned: Tensor = self.apply(key, key, cos, -sin)[1]
        return turned if abs(float(scale) - 1) < 1e-3 else self.apply(key, key, cos / scale, -sin / scale)[1]


def why_no_rotary(decoder: Any) -> str | None:
    """Why keys of this model cannot be turned from outside; None if they can."""
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    embedding = getattr(decoder, "rotary_emb", None)
    if apply is None or embedding is None:
        return "it has no rotary embedding in the usual place"
    if list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return "its rotary embedding takes other arguments"
    if list(inspect.signature(embedding.forward).parameters)[:3] not in (["x", "position_ids"],):
        return "it has several rotary embeddings"
    scaling = getattr(decoder.config, "rope_parameters", None) or {}
    if scaling.get("rope_type", "default") in ("dynamic", "longrope") or "mrope_section" in scaling:
        return f"its rotary frequencies depend on more than the position ({scaling.get('rope_type', 'mrope')})"
    return None
