"""Importance and diversity by principal components: after PruneSID (arXiv 2603.09480), with the details of our own.

Of the n visual tokens x of a prompt as they enter the language model, K stay:

    components  X = x / |x| - mean,  X = U S V^T;  a = |U S| over the first C directions, C = max(1, K / per_direction)
    groups      a token belongs to the direction on which it lies farthest out: g_i = argmax_c a_ic, importance a_ig
    budgets     equal for all groups, what a small group cannot use goes to the others in turn
    in a group  by importance; a token whose cosine with one that was taken exceeds the mean cosine of all tokens plus
                half of what is missing to 1 waits until no other token of the group is left

The paper's two stages are these: groups by principal components, then suppression of what resembles a more important
token of its group. Its thresholds, its sizes of groups and its budgets by image were not taken over. No attention is
looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.visual.base import EntranceTokens

_DIGITS = 8  # of an importance: copies of a token differ by rounding, and the first one counts


@dataclass(frozen=True)
class PruneSID(EntranceTokens):
    """Keeps the important tokens of each principal direction that are no copies of one another."""

    per_direction: int = option("tokens kept for each principal direction", 4, most=ENTRIES, least=1)

    name: ClassVar[str] = "prunesid"
    info: ClassVar[MethodInfo] = MethodInfo(
        "after PruneSID, arXiv 2603.09480",
        "visual tokens before the language model, by importance and diversity",
        kinds=("vision",),
    )

    def pick(self, features: Tensor, text: Tensor, kept: int) -> Tensor:
        direction = F.normalize(features.double(), dim=-1)
        alike = direction @ direction.mT
        count = len(direction)
        threshold = (1 + (alike.sum() - alike.diagonal().sum()) / max(1, count * (count - 1))) / 2
        importance, group = self._groups(direction, kept)
        close, importance = (alike > threshold).cpu(), importance.cpu()  # token by token from here on
        queues = [_queue(own, importance, close) for own in _members(group)]
        chosen: list[int] = []
        for turn in range(max(map(len, queues))):
            here = [queue[turn] for queue in queues if turn < len(queue)]
            here.sort(key=lambda token: (-float(importance[token]), token))
            chosen += here[: kept - len(chosen)]
        return torch.tensor(sorted(chosen), device=features.device)

    def _groups(self, direction: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Importance fp64 [n] and group int64 [n] of each token."""
        left, sizes, _ = torch.linalg.svd(direction - direction.mean(0), full_matrices=False)
        reach = (left * sizes).abs()[:, : max(1, kept // self.per_direction)]
        importance, group = reach.max(-1)
        return importance.round(decimals=_DIGITS), group


def _members(group: Tensor) -> list[list[int]]:
    """The tokens of each group that has any, ascending."""
    found: dict[int, list[int]] = {}
    for token, own in enumerate(group.tolist()):
        found.setdefault(own, []).append(token)
    return list(found.values())


def _queue(own: list[int], importance: Tensor, close: Tensor) -> list[int]:
    """The tokens of a group in the order in which they are kept: copies of a more important one come last."""
    own = sorted(own, key=lambda token: (-float(importance[token]), token))
    first: list[int] = []
    late: list[int] = []
    for token in own:
        copied = bool(first) and bool(close[token, first].any())
        (late if copied else first).append(token)
    return first + late
