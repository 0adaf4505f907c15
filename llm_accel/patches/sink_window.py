"""Attention that sees the first tokens and a window of recent ones, in plain torch: O(n (S + R)), never n x n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_accel.patches.base_attention import attend, attend_visible

QUERY_BLOCK = 256


def sink_window_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None,
    positions: Tensor | None,
    sinks: int,
    recent: int,
    **kwargs: Any,
) -> Tensor:
    """The newest T queries; the one at position ``i`` sees ``j <= i`` with ``j < sinks`` or ``i - j < recent``.

    Args:
        query: [B, Hq, T, D]; the last T slots belong to these queries.
        key, value: [B, H, P, D], oldest first.
        start: first real slot of each row, int64 [B], or None.
        positions: position of each slot, int64 [B, P], below 0 for padding; None where no entry is missing.

    Returns:
        [B, T, Hq, Dv]
    """
    batch, slots, length = key.shape[0], key.shape[2], query.shape[2]
    if slots <= sinks + recent and positions is None:
        return attend(base, module, query, key, value, start, **kwargs)
    first = torch.zeros(batch, dtype=torch.long, device=key.device) if start is None else start.to(key.device)
    if positions is None:
        positions = torch.arange(slots, device=key.device)[None] - first[:, None]
    sink_slots = first[:, None] + torch.arange(sinks, device=key.device)
    inside = sink_slots < slots
    sink_slots = sink_slots.clamp(max=slots - 1)
    sink_keys, sink_values = (_rows(tensor, sink_slots) for tensor in (key, value))
    sink_positions = positions.gather(1, sink_slots)
    parts = []
    for begin in range(slots - length, slots, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, slots)
        left = max(0, begin - recent + 1)
        own, near = positions[:, begin:end, None], positions[:, None, left:end]
        window = (near >= 0) & (near <= own) & ((own - near < recent) | (near < sinks))
        far = (inside & (sink_slots < left))[:, None] & (sink_positions[:, None] < sinks)
        far = far & (sink_positions[:, None] <= own) & (sink_positions[:, None] >= 0)
        parts.append(
            attend_visible(
                base,
                module,
                query[:, :, begin - slots + length : end - slots + length],
                torch.cat([sink_keys, key[:, :, left:end]], dim=2),
                torch.cat([sink_values, value[:, :, left:end]], dim=2),
                torch.cat([far, window], dim=-1)[:, None],
                **kwargs,
            )
        )
    return torch.cat(parts, dim=1)


def _rows(tensor: Tensor, slots: Tensor) -> Tensor:
    """Entries [B, H, n, D] at ``slots`` [B, n]."""
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))
