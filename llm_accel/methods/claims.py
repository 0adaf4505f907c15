"""What methods that are applied together may not both decide."""

from __future__ import annotations

from enum import Enum


class Claim(Enum):
    """Something that one method decides alone. The value says what two methods would both do."""

    DECODING = "decode the answer"
    WEIGHTS = "shift attention between entries"
    KV = "decide which KV entries stay"
    ATTENTION = "compute attention"
    ORDER = "rest on how entries lie in the cache"
    VISUAL_TOKENS = "decide which visual tokens reach the decoder"
    LAYER_CUT = "let visual tokens leave after a layer"
    HEADS = "scale the outputs of heads"
