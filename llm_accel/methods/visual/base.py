"""The roles of methods that decide about visual tokens. The patches know these roles and never a method by name."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodConfig, option
from llm_accel.methods.budget import fraction
from llm_accel.methods.claims import Claim
from llm_accel.methods.layer_view import LayerView
from llm_accel.methods.selection import top_tokens


@dataclass(frozen=True)
class VisualBudget(MethodConfig):
    """How many visual tokens of an image a method keeps. An image with fewer passes through untouched."""

    budget: int | None = option("visual tokens kept per image; not with ratio", None, most=2 * ENTRIES, least=1)
    ratio: float | None = option(
        "fraction of an image's visual tokens kept, in (0, 1]; not with budget", None, share="(0, 1]"
    )

    default_ratio: ClassVar[float] = 1 / 3
    renamed: ClassVar[Mapping[str, str]] = {"target": "budget", "keep_ratio": "ratio"}

    def validate(self) -> None:
        self.at_most_one("budget", "ratio")

    @property
    def default_budget(self) -> int | None:
        """The budget where neither option is given; None: ``default_ratio`` holds."""
        return None

    def tokens(self, count: int, parts: int = 1) -> int:
        """How many of ``count`` visual tokens stay, which are one of the ``parts`` that share a budget."""
        budget = self.default_budget if self.budget is None and self.ratio is None else self.budget
        if budget is not None:
            return min(count, math.ceil(budget / parts))
        return min(count, fraction(self.default_ratio if self.ratio is None else self.ratio, count))


@dataclass(frozen=True)
class VisualInput(VisualBudget):
    """What reaches the language model of an image is decided before it runs."""

    positions: Literal["original", "compact"] = option(
        "original: remaining tokens keep their positions in the prompt; compact: they are renumbered without gaps, for "
        "models whose positions have one axis",
        "original",
    )

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.VISUAL_TOKENS: ""} | ({Claim.LAYER_CUT: ""} if self.always_cuts else {})

    def compact_on(self, axes: int) -> bool:
        """Whether tokens are renumbered in a model whose positions have so many axes."""
        return self.positions == "compact"

    def second_stage(self, model: CutModel) -> Cut | None:
        """The cut inside the language model that takes out what was let through beyond the budget; None: there is none.

        Raises:
            ConfigError: one was asked for that this model cannot have.
        """
        return None

    @property
    def always_cuts(self) -> bool:
        """Whether a second stage was asked for, so that no other method can let tokens leave between layers."""
        return False

    def two_stages(self) -> Self:
        """The method on models for which it was released with a second stage for images of any size."""
        return self

    def one_stage(self) -> Self:
        """The method without a second stage."""
        return self


@dataclass(frozen=True)
class VisualTokens(VisualInput):
    """Role: decides which visual tokens of an image reach the language model."""

    newline: Literal["drop", "keep"] = option(
        "newline tokens of tiled images: drop them once another token is dropped, or keep them without counting them",
        "drop",
    )

    def first_stage_tokens(self, count: int, parts: int = 1) -> int:
        """How many of ``count`` visual tokens, one of the ``parts`` that share a budget, enter the language model: more
        than :meth:`tokens` where a second stage takes out the rest."""
        return self.tokens(count, parts)

    @abstractmethod
    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        """Which ``first_stage_tokens(count)`` of the ``count`` visual tokens of one image are kept: int64, ascending.

        Args:
            count: visual tokens of the image, in raster order, newline rows left out.
            scores: fp32 of each token, [count], for methods that look at the vision tower; None otherwise.
            device: where the result is wanted.
        """


@dataclass(frozen=True)
class VideoTokens(VisualInput):
    """Role: decides which tokens of a video reach the language model, from its frames side by side. A budget is the
    mean over the frames; images keep all their tokens."""

    def total(self, frames: int, count: int) -> int:
        """How many tokens of a video of ``frames`` frames with ``count`` tokens each stay."""
        return frames * self.tokens(count)

    @abstractmethod
    def keep(self, frames: Tensor) -> Tensor:
        """Which tokens of one video stay, bool [T, n], ``total(T, n)`` of them.

        Args:
            frames: the features of its frames, or of what the tower makes of two frames, fp32 [T, n, C]; a place in n
                is the same place of the picture in all of them.
        """


@dataclass(frozen=True)
class EntranceTokens(VisualBudget):
    """Role: decides, before the language model runs, which of the visual tokens of a prompt enter it, from what they
    and the text look like there. All images of a prompt count together; those that stay keep their positions."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.VISUAL_TOKENS: ""}

    @abstractmethod
    def pick(self, features: Tensor, text: Tensor, kept: int) -> Tensor:
        """Which ``kept`` of the n visual tokens of one prompt stay: int64, ascending.

        Args:
            features: what stands for them at the entrance of the language model, fp32 [n, C].
            text: the same of all other tokens of the prompt, fp32 [m, C].
        """


@dataclass(frozen=True)
class CutView:
    """The rows of a prompt after one decoder layer.

    Attributes:
        visual: bool [B, n], which rows are visual tokens.
        real: bool [B, n], which rows are no padding.
        scores: what :attr:`Cut.score` made of each row in this layer, fp32 [B, n]; None without one.
        hidden: the layer's output, [B, n, C].
        layer: index of the layer.
        surplus: visual tokens of each row beyond its budget, which a first stage let through, int64 [B], or None.
    """

    visual: Tensor
    real: Tensor
    scores: Tensor | None = None
    hidden: Tensor | None = None
    layer: int = 0
    surplus: Tensor | None = None

    def best(self, kept: Callable[[int, int], int]) -> Tensor:
        """bool [B, n]: all rows but the visual tokens of lower score; ``kept`` says how many of them stay, from the
        index of a row of the batch and the number of its visual tokens."""
        assert self.scores is not None
        keep = self.real.clone()
        for row, scores in enumerate(self.scores):
            tokens = self.visual[row].nonzero()[:, 0]
            keep[row, tokens] = False
            keep[row, tokens[top_tokens(scores[tokens], kept(row, len(tokens)))]] = True
        return keep


@dataclass(frozen=True)
class LastQuery(LayerView):
    """What the last query of a prompt meets in one decoder layer; ``query`` is [B, Hq, 1, D].

    Attributes:
        value: [B, H, S, Dv]; the last entry is the query's own.
        visual: bool [B, S], entries that are visual tokens of the running call.
    """

    value: Tensor
    visual: Tensor


@dataclass(frozen=True)
class CutModel:
    """What is known of the model whose layers visual tokens are to leave.

    Attributes:
        name: its family in transformers.
        layers: layers L of its decoder.
        hidden: channels C of a row.
        first: the first layer after which visual tokens may leave.
        config_hash, weights_hash: its fingerprints; ``weights_hash`` is "offloaded" where weights are not in memory.
        calibration: a calibration of exactly these weights that comes with the package, or None.
    """

    name: str
    layers: int
    hidden: int
    first: int = 0
    config_hash: str = ""
    weights_hash: str = ""
    calibration: Path | None = None


@dataclass(frozen=True)
class Cut:
    """What a method does between the layers of one model.

    Attributes:
        layers: the layers after which tokens may leave, ascending; they do after the first one where ``keep`` drops
            any, and after no other one in the same call. Empty: none ever leaves.
        keep: which rows go on, bool [B, n]; rows that are no visual tokens always do.
        score: from the last query to a score of every entry, fp32 [B, S], which ``keep`` is given; None: it needs none.
        surplus_only: whether it leaves prompts alone of which a first stage let nothing through beyond the budget.
        origin: (what was chosen, why) for the report; None where the configuration says it all.
    """

    layers: tuple[int, ...]
    keep: Callable[[CutView], Tensor]
    score: Callable[[LastQuery], Tensor] | None = None
    surplus_only: bool = False
    origin: tuple[str, str] | None = None


@dataclass(frozen=True)
class LayerCut(MethodConfig):
    """Role: lets visual tokens leave the language model after one of its layers. Layers up to it keep their entries for
    the whole generation, later ones never get them."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.LAYER_CUT: ""}

    @abstractmethod
    def after(self, layers: int) -> int:
        """The layer after which tokens leave, of a model with ``layers`` layers; the last one: none does.

        Raises:
            ConfigError: the model has no such layer.
        """

    @abstractmethod
    def keep(self, view: CutView) -> Tensor:
        """Which rows go on, bool [B, n]; rows that are no visual tokens always do."""

    def cut(self, model: CutModel) -> Cut:
        """The cut on one model. Methods that know a single layer need no more than :meth:`after`.

        Raises:
            ConfigError: the model has no such layer, or what was learned about another model is to decide on this one.
        """
        last = self.after(model.layers)
        return Cut((last,) if last < model.layers - 1 else (), self.keep)
