"""FlowCut in the vision towers of Qwen and those built like them, written a second time: image by image, tokens in
raster order, windows from coordinates, attention as a masked map, rows taken out of plain lists. Shares nothing with
the package, and with transformers only the linear maps, norms and MLPs of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Kept:
    """What is left of one image or pair of frames: tokens int64, ascending, in raster order; their features [n, C];
    those of deeper layers, one [tokens, C] each, zero for tokens that had left; tokens under way behind each layer."""

    tokens: Tensor
    features: Tensor
    deeper: list[Tensor]
    sizes: list[int]


def flowcut(
    tower: Any, pixels: Tensor, grid: Sequence[int], tokens: int, depth: float = 1.0, every: int = 2
) -> list[Kept]:
    """The procedure on one image or video, for each of its frames. ``tokens``: how many of a frame enter the language
    model; ``depth``: share of the layers after which the last cut is made."""
    frames, rows, columns = grid
    first = _entering(tower, pixels, grid)
    size = rows * columns
    return [
        _frame(tower, first[frame * size : frame * size + size], rows, columns, tokens, depth, every)
        for frame in range(frames)
    ]


def _entering(tower: Any, pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """What enters the first layer, [patches, C], in raster order of tokens."""
    if hasattr(tower, "fullatt_block_indexes"):  # inside, tokens would stand in the order of windows
        return tower.patch_embed(pixels)
    seen: list[Tensor] = []
    hook = tower.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    tower(pixels, grid_thw=torch.tensor([list(grid)]))
    hook.remove()
    return seen[0]


def _frame(tower: Any, hidden: Tensor, rows: int, columns: int, wanted: int, depth: float, every: int) -> Kept:
    side = tower.spatial_merge_size
    unit, wide = side * side, columns // side
    places = [
        (u // wide * side + p // side, u % wide * side + p % side)
        for u in range(len(hidden) // unit)
        for p in range(unit)
    ]
    window = [(u // wide, u % wide) for u in range(len(hidden) // unit)]
    if hasattr(tower, "fullatt_block_indexes"):
        span = tower.window_size // side // tower.patch_size
        window = [(row // span, column // span) for row, column in window]
    whole = list(getattr(tower, "fullatt_block_indexes", range(len(tower.blocks))))
    limit = max(-int(-depth * len(tower.blocks) // 1) - 1, 0)
    looked = [layer for layer in whole if layer <= limit] or whole[:1]
    left, scores, sizes, deeper = list(range(len(window))), None, [], []
    for index, block in enumerate(tower.blocks):
        inside = block.norm1(hidden)
        query, key, value = _heads(block.attn, inside, [places[unit * u + p] for u in left for p in range(unit)])
        near = torch.ones(len(hidden), len(hidden), dtype=torch.bool)
        if index not in whole:
            own = [window[u] for u in left for _ in range(unit)]
            near = torch.tensor([[a == b for b in own] for a in own])
        scale = query.shape[-1] ** -0.5
        paid = (scale * query @ key.mT).masked_fill(~near, float("-inf")).softmax(-1)
        hidden = hidden + block.attn.proj((paid @ value).transpose(0, 1).flatten(1))
        hidden = hidden + block.mlp(block.norm2(hidden))
        if index in looked:
            relation = (scale * query.double().mean(1, keepdim=True) @ key.double().mT).softmax(-1)[:, 0].mean(0)
            now = relation * value.double().mean(0).abs().sum(-1)
            scores = now if scores is None else 0.5 * scores + 0.5 * now
            kept = survivors(relation, len(left) * unit, wanted * unit, looked[-1] - index, every)
            means = scores.view(-1, unit).mean(1)
            best = sorted(sorted(range(len(left)), key=lambda u: -float(means[u]))[: -(-kept // unit)])
            patches = [unit * u + p for u in best for p in range(unit)]
            hidden, scores, left = hidden[patches], scores[patches], [left[u] for u in best]
        if index in (getattr(tower, "deepstack_visual_indexes", None) or ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(index)]
            found = merger(hidden)
            deeper.append(found.new_zeros(len(window), found.shape[1]).index_copy(0, torch.tensor(left), found))
        sizes.append(len(left))
    return Kept(torch.tensor(left), _merged(tower, hidden), deeper, sizes)


def survivors(relation: Tensor, patches: int, budget: int, to_go: int, every: int) -> int:
    """How many of an image's patches are left after a layer, ``to_go`` layers before the last cut."""
    if patches <= budget or to_go == 0:
        return min(patches, budget)
    if to_go % every:
        return patches
    share = relation / relation.sum()
    spread = float(-(share * share.log()).sum() / torch.tensor(float(patches)).log())
    return max(patches - round((patches - budget) / to_go**0.5 * (1 - spread**2)), budget)


def _heads(attention: Any, inside: Tensor, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [h, n, d], the first two turned by row and column."""
    if hasattr(attention, "qkv"):
        parts = attention.qkv(inside).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    else:
        each = (attention.q, attention.k, attention.v)
        parts = tuple(part(inside).unflatten(-1, (attention.num_heads, -1)) for part in each)
    if hasattr(attention, "q_norm"):
        parts = (attention.q_norm(parts[0]), attention.k_norm(parts[1]), parts[2])
    query, key, value = (part.transpose(0, 1) for part in parts)
    width = query.shape[-1] // 2
    speed = 1.0 / 10000.0 ** (torch.arange(0, width, 2) / width)
    angle = torch.tensor([[float(row), float(column)] for row, column in places])[:, :, None] * speed
    angle = angle.flatten(1).repeat(1, 2)

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    return turned(query), turned(key), value


def _merged(tower: Any, hidden: Tensor) -> Tensor:
    if isinstance(getattr(tower, "downsample", None), nn.Conv2d):
        side = tower.spatial_merge_size
        blocks = tower.post_layernorm(hidden).view(-1, side, side, hidden.shape[-1]).permute(0, 3, 1, 2)
        return tower.merger(tower.downsample(blocks).flatten(1))
    return tower.merger(hidden)
