"""FlowCut: patches leave the vision tower step by step, by the information that flows to its class token
(arXiv 2505.19536).

After each layer a patch j gets the score S_j = (R_j / sum R + M_j / sum M) * I_j, from

- relation R: attention that the class token pays to it, mean over heads;
- semantics M: softmax of the raw dot products of values with the class token's value, mean over heads;
- density I: L1 norm of its value, averaged over heads.

Scores are accumulated, A = (1 - ema) * A + ema * S. After every second layer, counted back from the last cut, the
lowest patches leave: all of them above the budget T at the last cut, (N - T) / sqrt(layers to go) * (1 - H^2) of N
before it, where H is the entropy of R over ln N. A tower without a class token is scored by its mean query, R * I.

Images of many tokens, and as released all images of Qwen, get a second stage (``llm_stage``): ``vision_factor`` times
the budget enters the language model, and after layer ``llm_layer`` the last query of the prompt chooses as many as the
budget allows by (R + M) * I, where R is the softmax of its products with the keys of visual tokens alone, M that of its
value with theirs, both scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels.column_votes.reference import soft_capped
from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.selection import top_tokens
from llm_accel.methods.visual.base import Cut, CutModel, CutView, LastQuery
from llm_accel.methods.visual.tower import TowerCut, TowerView, probabilities, relation

STATIC_ENTROPY = 0.8
# visual tokens of an image from which on it gets two stages: more than one tile has
MANY = 1024


@dataclass(frozen=True)
class FlowCut(TowerCut):
    """Cuts patches inside the vision tower, those that least information flows from."""

    ema: float = option("weight of the newest layer in the accumulated score, in (0, 1]", 0.5, share="(0, 1]")
    cut_every: int = option("layers between two cuts", 2, most=LAYERS, least=1)
    schedule: Literal["adaptive", "static"] = option(
        f"adaptive: the entropy of attention decides how many patches are dropped, per image; static: as for entropy "
        f"{STATIC_ENTROPY}, without device synchronization",
        "adaptive",
    )
    tower_stage: Literal["inside", "behind"] = option(
        "inside: patches leave between the layers of the tower, where it allows; behind: they are scored there, and "
        "all leave after it, so that only the language model gets cheaper",
        "inside",
    )
    tower_depth: float = option(
        "share of the tower's layers after which all patches above the budget have left, in (0, 1]; 1: as late as "
        "published; less makes the tower cheaper and chooses by fewer layers",
        1.0,
        share="(0, 1]",
    )
    llm_stage: Literal["auto", "on", "off"] = option(
        f"second stage inside the language model; auto: for images of more than {MANY} tokens, and on Qwen and models "
        "built like it for all, unless another method drops visual tokens between layers",
        "auto",
    )
    llm_layer: int = option(
        "layer after which the second stage drops tokens, or the first one that the model allows",
        1,
        most=LAYERS,
        least=0,
    )
    vision_factor: float = option(
        "multiple of the budget that is passed to the language model before a second stage", 2.0, most=1000.0
    )

    name: ClassVar[str] = "flowcut"
    info: ClassVar[MethodInfo] = MethodInfo(
        "FlowCut, arXiv 2505.19536", "visual tokens, inside the vision tower", kinds=("vision",)
    )

    def validate(self) -> None:
        if self.vision_factor <= 1.0:
            self.fail("vision_factor", "a number above 1")
        super().validate()

    @property
    def inside(self) -> bool:
        return self.tower_stage == "inside"

    @property
    def depth(self) -> float:
        return self.tower_depth

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        assert scores is not None
        return top_tokens(scores, self.first_stage_tokens(count))

    def first_stage_tokens(self, count: int, parts: int = 1) -> int:
        total = count * parts
        if self.llm_stage == "off" or (self.llm_stage == "auto" and total <= MANY):
            return self.tokens(count, parts)
        entering = math.ceil(self.vision_factor * self.tokens(total) / parts)
        return entering if entering < count else self.tokens(count, parts)

    def second_stage(self, model: CutModel) -> Cut | None:
        layer = max(self.llm_layer, model.first)
        if self.llm_stage == "off" or (self.llm_stage == "auto" and layer >= model.layers - 1):
            return None
        if layer >= model.layers - 1:
            raise ConfigError(
                f"{self.spec()} cuts after layer {layer}, but nothing is saved after layer {model.layers - 1}, the "
                f"last of {model.name}; give a smaller llm_layer, or llm_stage='off'."
            )
        return Cut((layer,), _without_surplus, score=second_stage_score, surplus_only=True)

    @property
    def always_cuts(self) -> bool:
        return self.llm_stage == "on"

    def two_stages(self) -> FlowCut:
        return replace(self, llm_stage="on") if self.llm_stage == "auto" else self

    def one_stage(self) -> FlowCut:
        return replace(self, llm_stage="off")

    def score(self, view: TowerView, before: Tensor | None) -> Tensor:
        now = layer_score(view)
        return now if before is None else (1 - self.ema) * before + self.ema * now

    def survivors(self, view: TowerView, sizes: Tensor, budgets: Tensor) -> Tensor:
        to_go = view.last - view.layer
        if to_go == 0:
            return budgets
        if to_go % self.cut_every or not bool((sizes > budgets).any()):
            return sizes
        spread = torch.full(sizes.shape, STATIC_ENTROPY) if self.schedule == "static" else entropy(view).cpu()
        cut = ((sizes - budgets) / math.sqrt(to_go) * (1 - spread**2)).round().long()
        return torch.maximum(sizes - cut, budgets)


def semantics(view: TowerView) -> Tensor:
    """Softmax over all rows of the unscaled products of their values with the class token's: fp32 [B, S]."""
    value = view.value.float()
    return probabilities(value[:, :, :1] @ value.mT, view.valid)[:, :, 0].mean(1)


def density(view: TowerView) -> Tensor:
    """L1 norm of the value of each row, averaged over heads first: fp32 [B, S]."""
    return view.value.float().mean(1).abs().sum(-1)


def layer_score(view: TowerView) -> Tensor:
    """The score of one layer: fp32 [B, N], 0 for padding."""
    if not view.class_token:
        return (relation(view) * density(view)).masked_fill(~view.patches, 0.0)
    attended, alike = relation(view)[:, 1:], semantics(view)[:, 1:]
    share = attended / attended.sum(-1, keepdim=True) + alike / alike.sum(-1, keepdim=True)
    return (share * density(view)[:, 1:]).masked_fill(~view.patches, 0.0)


def second_stage_score(last: LastQuery) -> Tensor:
    """The score of the second stage: fp32 [B, S], 0 for all but visual tokens."""
    key, value = last.key.float(), last.value.float()
    logits = last.query.float().reshape(*key.shape[:2], -1, key.shape[-1]) @ key.mT * last.scaling
    logits = soft_capped(logits, last.softcap)
    alike = value[:, :, -1:] @ value.mT * value.shape[-1] ** -0.5
    share = last.heads.mean(_over(logits, last.visual) + _over(alike, last.visual))
    return share * last.heads.mean(value.mean(1)).abs().sum(-1)


def _over(logits: Tensor, visual: Tensor) -> Tensor:
    """Softmax of [B, h, n, S] over the visual entries alone, mean over h and n: fp32 [B, S]."""
    shares = logits.masked_fill(~visual[:, None, None], float("-inf")).softmax(-1)
    return shares.nan_to_num(0.0).mean((1, 2))


def _without_surplus(view: CutView) -> Tensor:
    assert view.surplus is not None
    surplus = view.surplus.tolist()
    return view.best(lambda row, tokens: tokens - surplus[row])


def entropy(view: TowerView) -> Tensor:
    """Entropy of the relation over the patches, divided by that of a uniform one: fp32 [B] in [0, 1]. A probability
    that underflows counts 0, where the published code has log(0)."""
    attended = relation(view)[:, int(view.class_token) :]
    share = attended / attended.sum(-1, keepdim=True)
    uniform = view.patches.sum(-1).clamp(min=2).float().log()
    spread: Tensor = torch.special.entr(share).sum(-1) / uniform
    return spread
