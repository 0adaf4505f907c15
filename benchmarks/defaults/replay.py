"""What many settings of a method would have answered, from one dense prefill.

The prompt is read once by the plain model, whose keys, values and last queries are noted. A setting's choice is then
computed by the method itself, and the tokens of the dense answer are read again with everything hidden that the setting
would have evicted, all settings as rows of one batch. That evicted equals hidden is one of the contracts of the package
(`tests/contracts`); greedy decoding gives the dense answer exactly where each of its tokens is still the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from llm_accel.methods.prompt_view import Depth, PromptView

OBSERVED = 64  # last queries of the prompt that are noted
_NAME = "llm_accel_replay"


@dataclass
class Layer:
    """What one layer of the prompt leaves: keys and values [1, Hk, n, D], its last queries [1, Hq, 64, D]."""

    key: Tensor
    value: Tensor
    query: Tensor
    scaling: float
    sliding: int | None


@dataclass
class Replay:
    """A model with the prompt that it has read.

    Attributes:
        hidden: for rows that are read again: which entries of the prompt each one sees in each layer, bool
            [rows, Hk, n]; a layer without a mask sees all.
    """

    model: Any
    layers: dict[int, Layer] = field(default_factory=dict)
    length: int = 0
    mode: Literal["prompt", "append", "rows"] = "prompt"
    seen: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        AttentionInterface.register(_NAME, self.attend)
        self.model.set_attn_implementation(_NAME)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> int:
        """Reads a prompt; the first token of the answer."""
        self.layers, self.length, self.mode = {}, len(ids), "prompt"
        return int(self._logits(torch.tensor([ids]), 0, 1)[0, -1].argmax())

    @torch.inference_mode()
    def answer(self, first: int, most: int, done: Callable[[list[int]], bool]) -> list[int]:
        """The dense model's greedy answer until it is ``done`` or has ``most`` tokens."""
        self.mode, tokens = "append", [first]
        while len(tokens) < most and not done(tokens):
            logits = self._logits(torch.tensor([tokens[-1:]]), self.length + len(tokens) - 1, 1)
            tokens.append(int(logits[0, -1].argmax()))
        for layer in self.layers.values():
            layer.key, layer.value = layer.key[:, :, : self.length], layer.value[:, :, : self.length]
        return tokens

    @torch.inference_mode()
    def next_tokens(self, tokens: Sequence[int], seen: dict[int, Tensor]) -> list[list[int]]:
        """The likeliest token behind each of ``tokens``, for each row of the masks ``seen``."""
        rows = next(iter(seen.values())).shape[0]
        self.mode, self.seen = "rows", seen
        ids = torch.tensor([list(tokens)]).expand(rows, -1)
        return self._logits(ids, self.length, len(tokens)).argmax(-1).tolist()

    def _logits(self, ids: Tensor, begin: int, kept: int) -> Tensor:
        positions = torch.arange(begin, begin + ids.shape[1])[None].expand(ids.shape[0], -1)
        return self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=kept).logits

    def views(self, window: int) -> dict[int, PromptView]:
        """What a method sees of the layers that it acts on."""
        acting = [index for index, layer in sorted(self.layers.items()) if layer.sliding is None]
        return {
            index: PromptView(
                query=self.layers[index].query[:, :, -window:],
                key=self.layers[index].key,
                kv_heads=self.layers[index].key.shape[1],
                start=None,
                scaling=self.layers[index].scaling,
                softcap=None,
                sinks=None,
                layer=index,
                layers=len(self.layers),
                depth=Depth(rank, len(acting)),
            )
            for rank, index in enumerate(acting)
        }

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """The attention function of the model; transformers' masks are not read."""
        index = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.mode == "prompt":
            self.layers[index] = Layer(key, value, query[:, :, -OBSERVED:].clone(), scale, sliding_window)
            output = _causal(query, key, value, scale, sliding_window)
        elif self.mode == "append":
            layer = self.layers[index]
            layer.key, layer.value = torch.cat([layer.key, key], 2), torch.cat([layer.value, value], 2)
            newest = slice(None if sliding_window is None else -sliding_window, None)
            output = F.scaled_dot_product_attention(
                query, layer.key[:, :, newest], layer.value[:, :, newest], scale=scale, enable_gqa=True
            )
        else:
            output = self._rows(self.layers[index], query, key, value, self.seen.get(index))
        return output.transpose(1, 2).contiguous(), None

    def _rows(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        """Each row over what it sees of the prompt and over its own tokens; [rows, Hq, m, D]."""
        rows, heads, count, width = query.shape
        stored = layer.key.shape[1]
        grouped = query.view(rows, stored, heads // stored, count, width)
        packed = grouped.transpose(0, 1).reshape(stored, -1, width)
        past = (packed @ layer.key[0].transpose(1, 2)).view(stored, rows, heads // stored, count, self.length)
        past = past.mul_(layer.scaling)
        if seen is not None:
            past = past.masked_fill_(~seen.transpose(0, 1)[:, :, None, None], float("-inf"))
        step = torch.arange(count)
        if layer.sliding is not None:
            gone = torch.arange(self.length)[None] <= (self.length + step - layer.sliding)[:, None]
            past = past.masked_fill_(gone, float("-inf"))
        own = (grouped @ key[:, :, None].transpose(-1, -2)).mul_(layer.scaling).transpose(0, 1)
        own = own.masked_fill(step[None] > step[:, None], float("-inf"))
        share = torch.cat([past, own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        old = (share[..., : self.length].reshape(stored, -1, self.length) @ layer.value[0]).view(
            stored, rows, heads // stored, count, width
        )
        new = share[..., self.length :].transpose(0, 1) @ value[:, :, None]
        return (old.transpose(0, 1) + new).reshape(rows, heads, count, width)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int | None) -> Tensor:
    mask = None
    if sliding is not None and query.shape[2] > sliding:
        slot = torch.arange(query.shape[2])
        mask = (slot[None] <= slot[:, None]) & (slot[None] > slot[:, None] - sliding)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
