"""FlowCut inside a vision tower without a class token, by hand: the plain model encodes one image, and between its
layers rows are taken out of what they are given and give. Of the model only what its attention gets is read; shares
nothing with the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.tower_oracle import survivors

_NAME = "of_a_row_oracle"


@dataclass
class Rows:
    """One image on its way.

    Attributes:
        units: patches of each of its tokens.
        tokens: how many of them enter the language model.
        last: the layer after which the last cut is made.
        left: patches under way, ascending.
        sizes: how many there are behind each layer.
    """

    units: Sequence[Sequence[int]]
    tokens: int
    last: int
    left: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = sorted(patch for unit in self.units for patch in unit)

    @property
    def kept(self) -> list[int]:
        """Tokens that are under way, ascending."""
        return [token for token, unit in enumerate(self.units) if set(unit) <= set(self.left)]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **given: Any
    ) -> tuple[Tensor, None]:
        """The attention of every layer."""
        self.seen.append((query[0].double(), key[0].double(), value[0].double(), given["scaling"]))
        return F.scaled_dot_product_attention(query, key, value, scale=given["scaling"]).transpose(1, 2), None

    def enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-hook of every layer: as if there had never been other patches."""
        if kwargs.get("position_embeddings") is None:
            return args, kwargs
        phases = tuple(one[self.left] for one in kwargs["position_embeddings"])
        bounds = torch.tensor([0, len(self.left)], dtype=torch.int32)
        return args, kwargs | {"position_embeddings": phases, "cu_seqlens": bounds}

    def leave(self, layer: int, hidden: Tensor, final: bool) -> Tensor:
        """The output of a layer without the patches that leave after it, or with zeros for all that have left."""
        if layer <= self.last:
            stay = self._stay(layer)
            hidden = hidden[..., [self.left.index(patch) for patch in stay], :]
            self.left = stay
        self.sizes.append(len(self.left))
        if not final:
            return hidden
        full = hidden.new_zeros(*hidden.shape[:-2], sum(map(len, self.units)), hidden.shape[-1])
        full[..., self.left, :] = hidden
        return full

    def _stay(self, layer: int) -> list[int]:
        query, key, value, scale = self.seen[-1]
        relation = (scale * query.mean(1, keepdim=True) @ key.mT).softmax(-1)[:, 0].mean(0)
        now = (relation * value.mean(0).abs().sum(-1)).tolist()
        for patch, one in zip(self.left, now, strict=True):
            self.scores[patch] = one if layer == 0 else 0.5 * self.scores[patch] + 0.5 * one
        unit = len(self.units[0])
        count = survivors(relation, len(self.left), self.tokens * unit, self.last - layer, 2)
        means = {token: sum(self.scores[patch] for patch in self.units[token]) for token in self.kept}
        best = sorted(means, key=lambda token: -means[token])[: -(-count // unit)]
        return sorted(patch for token in best for patch in self.units[token])


@contextmanager
def taking(tower: nn.Module, blocks: Sequence[nn.Module], rows: Rows) -> Iterator[None]:
    """Inside, one image through ``tower`` loses patches between its ``blocks``."""
    AttentionInterface.register(_NAME, rows.attend)
    configs = {id(part.config): part.config for part in tower.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    hooks = []
    for index, block in enumerate(blocks):

        def left(block: nn.Module, args: object, output: Any, index: int = index) -> Any:
            return rows.leave(index, output, index == len(blocks) - 1)

        hooks += [block.register_forward_pre_hook(rows.enter, with_kwargs=True), block.register_forward_hook(left)]
    for config in configs.values():
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for hook in hooks:
            hook.remove()
