"""The log-sum-exp of a layer's logits, which attention kernels compute beside the output and callers throw away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that give it, by name: its place among their results and, where they compute it on demand alone, the place
# of the argument that asks for it.
GIVERS: dict[str, tuple[int, int | None]] = {
    "aten::_scaled_dot_product_flash_attention": (1, None),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (1, None),
    "aten::_scaled_dot_product_efficient_attention": (1, 4),
    "aten::_scaled_dot_product_cudnn_attention": (1, 4),
    "flash_attn::_flash_attn_forward": (1, None),
}
COMPOSITE = torch.ops.aten.scaled_dot_product_attention.default


class AttentionLse(TorchDispatchMode):
    """While active, remembers what the attention of one layer says of its rows. It is the model's own attention that
    runs, as it would run anyhow; eager attention and the math backend have no log-sum-exp to give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is COMPOSITE:  # whole under inference mode
            with self:
                return func.decompose(*args, **kwargs)
        place, asked = GIVERS.get(func.name().removesuffix(".default"), (None, None))
        if place is None:
            return func(*args, **kwargs)
        if asked is not None:
            args = (*args[:asked], True, *args[asked + 1 :])
        result = func(*args, **kwargs)
        self._found.append(result[place])
        return result

    def of(self, query: Tensor) -> Tensor | None:
        """Log-sum-exp in natural units, fp32 [B, Hq, T], of queries [B, Hq, T, D]; None where attention gave none, or
        more than one, or one of another shape."""
        if len(self._found) != 1:
            return None
        (batch, heads, count), (found,) = query.shape[:3], self._found
        if found.numel() == 0 or found.shape[:2] != (batch, heads) or found.shape[2] < count:
            return None
        return found.reshape(batch, heads, -1)[:, :, :count]  # some kernels round rows up


def with_lse(attention: Callable[[], Tensor], query: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output of ``attention`` and the log-sum-exp that it computed for ``query``, [B, Hq, T, D]."""
    with AttentionLse() as lse:
        output = attention()
    return output, lse.of(query)
