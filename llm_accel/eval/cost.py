"""What a model must read and compute, counted on its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class ModelCost:
    """What a model must read and compute, independent of what runs it.

    Attributes:
        weight_bytes: all parameters.
        step_bytes: parameters that a decode step reads: all but the rows of the input embedding and a vision tower.
            Mixtures of experts read fewer.
        token_flop: operations per prompt token outside of attention.
        layers: layers of the language model.
        width: channels of all query heads together, the values' width.
    """

    weight_bytes: int
    step_bytes: int
    token_flop: float
    layers: int
    width: int

    @staticmethod
    def of(model: Any) -> ModelCost:
        """Counted on the modules of a model."""
        decoder, config = model.get_decoder(), model.config.get_text_config()
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        inside = [p for p in decoder.parameters() if p is not table]
        head_bytes = 0 if head is None else head.weight.nbytes
        return ModelCost(
            weight_bytes=sum(p.nbytes for p in model.parameters()),
            step_bytes=sum(p.nbytes for p in inside) + head_bytes,
            token_flop=2.0 * sum(p.numel() for p in inside),
            layers=int(config.num_hidden_layers),
            width=int(config.num_attention_heads) * head_dim(config),
        )

    def prompt_flop(self, length: int, batch: int) -> float:
        """Operations of a dense prefill of the language model, causal attention counted by half."""
        attention = 4.0 * self.layers * self.width * length * (length + 1) / 2
        return batch * (self.token_flop * length + attention)


def prefill_flops(model: Any, rows: Sequence[int]) -> int | None:
    """Floating-point operations of the decoder layers on a prompt of which layer i sees ``rows[i]`` rows.

    Two for each weight of a layer's linear maps and each row; for attention, two products of ``head_dim`` terms for
    each head, row and row before it or itself. Norms, rotary phases and the output head are left out; sparse attention
    is counted as dense. None for mixtures of experts, whose rows do not use all weights.
    """
    config = model.get_decoder().config
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    width, total = config.num_attention_heads * head_dim(config), 0
    for layer, n in zip(model.get_decoder().layers, rows, strict=True):
        weights = sum(part.weight.numel() for part in layer.modules() if isinstance(part, nn.Linear))
        total += 2 * weights * n + 4 * width * (n * (n + 1) // 2)
    return total


def mean_flops(model: Any, lengths: Sequence[int], gone: Sequence[int]) -> int | None:
    """Mean of :func:`prefill_flops` over prompts of ``lengths`` tokens, of which ``gone[i]`` do not reach layer i."""
    counts = [n for length in lengths if (n := prefill_flops(model, [length - rows for rows in gone])) is not None]
    return round(sum(counts) / len(counts)) if counts else None
