"""The roles of methods that look into the vision tower, and what they can read from one of its layers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.methods.visual.base import VisualTokens

# probabilities held at once where all queries are looked at
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TowerView:
    """One attention call of a vision tower, of B images or tiles.

    Attributes:
        query, key, value: [B, h, S, d] as attention sees them; the class token first where there is one.
        scaling: softmax scale.
        class_token: whether row 0 is the class token.
        valid: bool [B, S], rows that are no padding; None where all are.
        layer: index of the layer.
        last: the last layer after which tokens may be cut; one more layer, at least, mixes what is left.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    class_token: bool
    valid: Tensor | None
    layer: int
    last: int

    @property
    def patches(self) -> Tensor:
        """bool [B, N]: which patches are no padding."""
        return self.rows[:, int(self.class_token) :]

    @property
    def rows(self) -> Tensor:
        """bool [B, S]: which rows are no padding."""
        if self.valid is None:
            batch, _, rows, _ = self.query.shape
            return torch.ones(batch, rows, dtype=torch.bool, device=self.query.device)
        return self.valid


@dataclass(frozen=True)
class TowerTokens(VisualTokens):
    """Role: decides by what happens in the vision tower."""

    @property
    def last_layer_only(self) -> bool:
        """Whether only the layer whose features are used is looked at."""
        return False

    @abstractmethod
    def score(self, view: TowerView, before: Tensor | None) -> Tensor:
        """Scores of the patches after one layer, fp32 [B, N]; ``before``: those after the layer before it."""


@dataclass(frozen=True)
class TowerCut(TowerTokens):
    """Role: may cut patches inside the tower, so that its later layers are cheaper."""

    @property
    def inside(self) -> bool:
        """Whether they leave inside it, where it allows; else they are scored there and leave behind it."""
        return True

    @property
    def depth(self) -> float:
        """The share of the tower's layers that are scored, in (0, 1]; after the last of them all patches above the
        budget leave."""
        return 1.0

    @abstractmethod
    def survivors(self, view: TowerView, sizes: Tensor, budgets: Tensor) -> Tensor:
        """How many patches each image keeps after this layer, int64 [B] on the CPU, from ``budgets`` to ``sizes``, both
        int64 [B] on the CPU. At ``view.last`` it must be the budget."""


@dataclass(frozen=True)
class TowerMerge(TowerTokens):
    """Role: tokens that leave hand their features on to some of those that stay."""

    @abstractmethod
    def metric(self, view: TowerView) -> Tensor:
        """What tells how much patches resemble each other, fp32 [B, N, c]."""

    @property
    def takes_class(self) -> bool:
        """Whether the class token is one of the tokens that stay, and the first of them, where it can be one; the two
        parts of :meth:`split` follow it one after the other, where positions do not say where a token stood."""
        return False

    @abstractmethod
    def split(self, scores: Tensor, kept: int, others: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens of one image that stay, ``kept`` of them, in two parts, int64, each ascending: those that keep
        their features, and those that take others in. ``scores``: fp32 [n]; ``others``: how many of the ``kept`` are
        none of the n."""

    @abstractmethod
    def merge(self, features: Tensor, parts: tuple[Tensor, Tensor], metric: Tensor) -> Tensor:
        """The features [n, C] of one image where those of the second part have taken the others in.

        Args:
            features: [n, C].
            parts: what :meth:`split` returned.
            metric: fp32 [n, c].
        """

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        assert scores is not None
        return torch.cat(self.split(scores, self.tokens(count))).sort().values


def relation(view: TowerView) -> Tensor:
    """Attention of the class token, or of the mean query, to each row: fp32 [B, S], mean over heads."""
    if view.class_token:
        query = view.query[:, :, :1].float()
    else:
        real = view.patches[:, None, :, None].float()
        query = (view.query.float() * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
    return probabilities(query @ view.key.float().mT * view.scaling, view.valid)[:, :, 0].mean(1)


def received(view: TowerView) -> Tensor:
    """Attention that each row receives, mean over heads and queries: fp32 [B, S]. Blocked over queries, so that the
    attention map is never held."""
    batch, heads, rows, _ = view.query.shape
    real, key = view.rows, view.key.float()
    total = torch.zeros(batch, rows, device=view.query.device)
    for index in torch.arange(rows, device=view.query.device).split(max(1, _BLOCK // (batch * heads * rows))):
        paid = probabilities(view.query[:, :, index].float() @ key.mT * view.scaling, view.valid)
        total += (paid * real[:, None, index, None]).sum((1, 2))
    return total / (heads * real.sum(-1, keepdim=True))


def probabilities(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Softmax of [B, h, n, S] over the rows S that are no padding."""
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(-1)
