"""FlowCut in InternVL's vision tower, written a second time: tile by tile, patches by row and column, attention as a
map in float64, rows taken out of plain lists, blocks of patches put together by hand. Shares nothing with the package,
and with transformers only the embeddings, linear maps, norms and MLPs of the layers and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tower_oracle import survivors


@dataclass
class Kept:
    """What is left of one tile: tokens int64, ascending, line by line of blocks; their features [n, C]; tokens under
    way behind each layer; what the class token pays to each token in the first layer and the last whose output is used,
    mean over heads and patches, 0 where it had left, fp64 [tokens] each."""

    tokens: Tensor
    features: Tensor
    sizes: list[int]
    paid: tuple[Tensor, Tensor]


@torch.no_grad()
def flowcut(model: Any, pixels: Tensor, tokens: int, depth: float = 1.0, used: int = -1, every: int = 2) -> Kept:
    """The procedure on one tile [3, H, W].

    Args:
        tokens: how many of it enter the language model.
        depth: share of the layers after which the last cut is made.
        used: the hidden state whose rows are shuffled, as ``vision_feature_layer``.
        every: layers between two cuts.
    """
    tower, side = model.base_model.vision_tower, int(1 / model.config.downsample_ratio)
    hidden = tower.embeddings(pixels[None])[0]
    wide = int((len(hidden) - 1) ** 0.5)
    blocks = [(row, column) for row in range(wide // side) for column in range(wide // side)]
    patches = [(row, column) for row in range(wide) for column in range(wide)]
    layers = tower.encoder.layer[: len(tower.encoder.layer) + 1 + used]
    last = max(len(layers) - 2, 0)
    last = min(last, max(-int(-depth * len(layers) // 1) - 1, 0))
    known, sizes, seen = dict.fromkeys(patches, 0.0), [], []
    for index, layer in enumerate(layers):
        query, key, value = _heads(layer.attention, layer.layernorm_before(hidden))
        paid = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        seen.append(torch.zeros((wide // side) ** 2, dtype=torch.float64))
        for at, patch in enumerate(patches):
            row, column = _block(patch, side)
            seen[-1][row * (wide // side) + column] += paid[:, 0, 1 + at].mean() / side**2
        mixed = (paid @ value).transpose(0, 1).flatten(1).to(hidden.dtype)
        hidden = hidden + layer.lambda_1 * layer.attention.projection_layer(mixed)
        hidden = hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden))
        if index <= last:
            relation = paid[:, 0].mean(0)[1:]
            alike = (value[:, :1] @ value.mT).softmax(-1)[:, 0].mean(0)[1:]
            now = (relation / relation.sum() + alike / alike.sum()) * value.mean(0).abs().sum(-1)[1:]
            known = {
                patch: float(now[at]) if index == 0 else 0.5 * known[patch] + 0.5 * float(now[at])
                for at, patch in enumerate(patches)
            }
            count = survivors(relation, len(patches), tokens * side * side, last - index, every)
            inside = {block: [one for one in patches if _block(one, side) == block] for block in blocks}
            means = {block: sum(known[one] for one in inside[block]) / len(inside[block]) for block in blocks}
            stay = sorted(blocks, key=lambda block, means=means: -means[block])[: -(-count // side**2)]
            rows = [0] + [1 + at for at, one in enumerate(patches) if _block(one, side) in stay]
            hidden = hidden[rows]
            patches = [one for one in patches if _block(one, side) in stay]
            blocks = [block for block in blocks if block in stay]
        sizes.append(len(blocks))
    if used == -1:
        hidden = tower.layernorm(hidden)
    row_of = {patch: 1 + at for at, patch in enumerate(patches)}
    shuffled = [
        torch.cat([hidden[row_of[row * side + r, column * side + c]] for r in range(side) for c in range(side)])
        for row, column in blocks
    ]
    numbers = [row * (wide // side) + column for row, column in blocks]
    features = model.base_model.multi_modal_projector(torch.stack(shuffled))
    return Kept(torch.tensor(numbers), features, sizes, (seen[0], seen[-1]))


def _block(patch: tuple[int, int], side: int) -> tuple[int, int]:
    return patch[0] // side, patch[1] // side


def _heads(attention: Any, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [h, n, d] in float64."""
    parts = attention.q_norm(attention.q_proj(inside)), attention.k_norm(attention.k_proj(inside))
    query, key, value = (
        part.double().unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for part in (*parts, attention.v_proj(inside))
    )
    return query, key, value
