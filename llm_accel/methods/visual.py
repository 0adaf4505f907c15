"""The roles of methods that decide about visual tokens. The patches know these roles and never a method by name."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import MethodConfig, option


@dataclass(frozen=True)
class VisualBudget(MethodConfig):
    """How many visual tokens of an image a method keeps. An image with fewer passes through untouched."""

    target: int | None = option("visual tokens kept per image; not with keep_ratio", None)
    keep_ratio: float | None = option("fraction of the visual tokens kept, in (0, 1]; not with target", None)

    default_ratio: ClassVar[float] = 1 / 3

    def validate(self) -> None:
        if self.target is not None and self.keep_ratio is not None:
            raise ConfigError(
                f"{self.name}: target={self.target} and keep_ratio={self.keep_ratio} were both given; give one of them."
            )
        if self.target is not None and self.target < 1:
            self.fail("target", "an integer of at least 1, or None")
        if self.keep_ratio is not None and not 0.0 < self.keep_ratio <= 1.0:
            self.fail("keep_ratio", "a number in (0, 1], the fraction of the visual tokens that is kept")

    def tokens(self, count: int, parts: int = 1) -> int:
        """How many of ``count`` visual tokens stay, which are one of the ``parts`` that share a target."""
        if self.target is not None:
            return min(count, math.ceil(self.target / parts))
        ratio = self.default_ratio if self.keep_ratio is None else self.keep_ratio
        return min(count, max(1, math.ceil(ratio * count - 1e-9)))


@dataclass(frozen=True)
class VisualTokens(VisualBudget):
    """Role: decides which visual tokens of an image reach the language model."""

    newline: Literal["drop", "keep"] = option(
        "rows that mark line ends in tiled images: drop them once tokens are dropped, or keep them beside the target",
        "drop",
    )

    @abstractmethod
    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        """Which of the ``count`` visual tokens of one image stay, ``tokens(count)`` of them: int64, ascending.

        Args:
            count: visual tokens of the image, in raster order, newline rows left out.
            scores: fp32 >= 0 of each token, [count], for methods that look at the vision tower; None otherwise.
            device: where the result is wanted.
        """


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
        rows = self.query.shape[2] - int(self.class_token)
        if self.valid is None:
            return torch.ones(self.query.shape[0], rows, dtype=torch.bool, device=self.query.device)
        return self.valid[:, int(self.class_token) :]


@dataclass(frozen=True)
class TowerTokens(VisualTokens):
    """Role: decides by what happens in the vision tower, and may cut patches inside it."""

    @abstractmethod
    def score(self, view: TowerView, before: Tensor | None) -> Tensor:
        """Scores of the patches after one layer, fp32 >= 0 [B, N]; ``before``: those after the layer before it."""

    @abstractmethod
    def survivors(self, view: TowerView, sizes: Tensor, targets: Tensor) -> Tensor:
        """How many patches each image keeps after this layer, int64 [B] on the CPU, from ``targets`` to ``sizes``, both
        int64 [B] on the CPU. At ``view.last`` it must be the target."""


@dataclass(frozen=True)
class CutView:
    """The rows of a prompt behind one decoder layer.

    Attributes:
        visual: bool [B, n], which rows are visual tokens.
        real: bool [B, n], which rows are no padding.
        attention: what the last query of the prompt paid to each row in this layer, fp32 [B, n], mean over heads, for
            methods that ask for it; else None.
    """

    visual: Tensor
    real: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class LayerCut(MethodConfig):
    """Role: lets visual tokens leave the language model after one of its layers. Layers up to it keep their entries for
    the whole generation, later ones never get them."""

    @property
    def needs_attention(self) -> bool:
        """Whether the last query's attention is looked at."""
        return False

    @abstractmethod
    def after(self, layers: int) -> int:
        """The layer after which tokens leave, of a model with so many layers; the last one: none does.

        Raises:
            ConfigError: the model has no such layer.
        """

    @abstractmethod
    def keep(self, view: CutView) -> Tensor:
        """Which rows go on, bool [B, n]; rows that are no visual tokens always do."""
