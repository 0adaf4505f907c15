"""Query heads taken out of the computation, to see what rests on them; the cache stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_accel.cache import AccelLayer
from llm_accel.methods.kv.head_roles import HeadMask
from llm_accel.patches.base_attention import ModelAttention
from llm_accel.patches.phase import Phase
from llm_accel.patches.session import Session
from llm_accel.patches.sink_window import sink_window_attention


def masked_rows(mask: HeadMask, session: Session, length: int) -> int:
    """How many of the newest ``length`` queries lose the masked heads. In phase "decode" that begins with the last
    token of the prompt, whose output is the first token of the answer."""
    if mask.phase == "all" or not session.phase.in_prompt:
        return length
    return 1 if session.phase is Phase.PREFILL_END else 0


def attend_without(
    mask: HeadMask, heads: tuple[int, ...], rows: int, query: Tensor, attention: Callable[[Tensor], Tensor]
) -> Tensor:
    """``attention`` with the query heads ``heads`` silenced in the last ``rows`` queries, [B, T, Hq, Dv].

    Args:
        query: [B, Hq, T, D].
        attention: maps queries to outputs; for mode "uniform" it sees zeroed queries, whose logits are all equal.
    """
    index = torch.tensor(heads, device=query.device)
    last = torch.arange(query.shape[2] - rows, query.shape[2], device=query.device)
    if mask.mode == "uniform":
        query = query.clone()
        query[:, index[:, None], last] = 0
        return attention(query)
    output = attention(query).clone()
    output[:, last[:, None], index] = 0
    return output


def attend_window(
    mask: HeadMask,
    heads: tuple[int, ...],
    rows: int,
    attention: ModelAttention,
    tensors: tuple[Tensor, Tensor, Tensor],
    layer: AccelLayer,
    output: Tensor,
) -> Tensor:
    """``output`` [B, T, Hq, Dv] with the heads ``heads`` of the last ``rows`` queries seeing sinks and a window only.

    Args:
        tensors: query [B, Hq, T, D], key and value [B, H, P, D].
    """
    query, key, value = tensors
    group = query.shape[1] // key.shape[1]
    owners = sorted({head // group for head in heads})
    readers = torch.tensor([owner * group + i for owner in owners for i in range(group)], device=query.device)
    keys = torch.tensor(owners, device=query.device)
    part = sink_window_attention(
        attention.of_heads(readers),
        query[:, readers, -rows:],
        key.index_select(1, keys),
        value.index_select(1, keys),
        layer.start,
        mask.sinks,
        mask.recent,
    )
    chosen = [place for place, head in enumerate(readers.tolist()) if head in heads]
    output = output.clone()
    last = torch.arange(query.shape[2] - rows, query.shape[2], device=query.device)
    output[:, last[:, None], readers[chosen]] = part[:, :, chosen]
    return output
