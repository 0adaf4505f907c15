"""VHR, PAINT and VAR written down a second time, in float64: one pass of the stock model over a whole dialogue of one
row, with the full attention matrix of every layer and head by head, nothing cached and nothing evicted but hidden."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_accel import PAINT, VAR, VHR
from llm_accel.methods import MethodConfig
from tests.contracts.plain_attention import running
from tests.vision_oracle import layers_of


@dataclass
class Dialogue:
    """One row. Rows are those that entered the decoder.

    Attributes:
        rows: what enters it, [1, T, C].
        positions: int64 [..., 1, T].
        visual: bool [T].
        spoken: bool [T], tokens that were decoded one by one, and so are no part of a prompt.
        last: bool [T], the last token of each prompt, and every decoded one.
        marks: what PAINT says of each row, int64 [T].
        hidden: layer -> bool [Hk, T, T], entries that a query no longer finds in the cache of a KV head.
    """

    rows: Tensor
    positions: Tensor
    visual: Tensor
    spoken: Tensor
    last: Tensor
    marks: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)


class Oracle:
    """An attention function."""

    def __init__(self, dialogue: Dialogue, method: MethodConfig | None, factors: dict[int, list[float]]) -> None:
        self.dialogue, self.method, self.factors = dialogue, method, factors
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer, length, heads = module.layer_idx, query.shape[2], query.shape[1]
        group = heads // key.shape[1]
        output = torch.zeros(1, length, heads, value.shape[-1], dtype=query.dtype)
        for head in range(heads):
            keys, values = key[0, head // group], value[0, head // group]
            logits = query[0, head] @ keys.T * kwargs["scaling"]
            unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
            if layer in self.dialogue.hidden:
                unseen = unseen | self.dialogue.hidden[layer][head // group]
            if isinstance(self.method, PAINT) and layer in self.method.acting_layers(self._layers(module)):
                logits = self._painted(self.method, logits)
            weights = logits.masked_fill(unseen, -math.inf).softmax(-1)
            if isinstance(self.method, VAR) and layer in self.method.acting_layers(self._layers(module)):
                weights = self._redistributed(self.method, layer, weights, ~unseen)
            output[0, :, head] = weights @ values * self.factors.get(layer, [1.0] * heads)[head]
            self.outputs[layer] = output
        return output, None

    def _layers(self, module: nn.Module) -> int:
        return int(module.config.num_hidden_layers)

    def _painted(self, method: PAINT, logits: Tensor) -> Tensor:
        marks, logits = self.dialogue.marks, logits.clone()
        assert marks is not None
        for row in self.dialogue.last.nonzero()[:, 0].tolist():
            for column in range(row + 1):
                weight = {0: 0.0, 1: method.alpha, 2: method.beta}[int(marks[column])]
                logits[row, column] += weight * abs(logits[row, column])
        return logits

    def _redistributed(self, method: VAR, layer: int, weights: Tensor, seen: Tensor) -> Tensor:
        states = self.states[layer][0]
        assert method.dims is not None
        scale = (states.square().mean(-1) + 1e-6).sqrt()
        sink = [
            not self.dialogue.spoken[row]
            and max(float(abs(states[row, dim]) / scale[row]) for dim in method.dims) > method.tau
            for row in range(len(states))
        ]
        visual, weights = self.dialogue.visual.tolist(), weights.clone()
        for row in range(len(states)):
            columns = [column for column in range(row + 1) if seen[row, column]]
            image = [column for column in columns if visual[column]]
            kept = [column for column in image if not sink[column]]
            sinks = [column for column in columns if sink[column]]
            paid, useful = float(weights[row, image].sum()), float(weights[row, kept].sum())
            if visual[row] or not any(sink[column] for column in image) or not useful:
                continue
            if paid < method.least or useful / paid < method.rho:
                continue
            freed = method.remove * float(weights[row, sinks].sum())
            weights[row, kept] += freed * weights[row, kept] / useful
            weights[row, sinks] *= 1 - method.remove
        return weights


def decoded(model: PreTrainedModel, dialogue: Dialogue, oracle: Oracle) -> Tensor:
    """Logits [T, V] of a model in float64."""

    def entering(index: int) -> Any:
        def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            oracle.states[index] = args[0] if args else kwargs["hidden_states"]

        return record

    blocks = enumerate(layers_of(model))
    hooks = [block.register_forward_pre_hook(entering(index), with_kwargs=True) for index, block in blocks]
    mask = torch.ones(1, dialogue.rows.shape[1], dtype=torch.long)
    with torch.no_grad(), running(model, oracle):
        output = model.get_decoder()(
            inputs_embeds=dialogue.rows, position_ids=dialogue.positions, attention_mask=mask, use_cache=False
        )
        logits = model.lm_head(output.last_hidden_state)[0]
    for hook in hooks:
        hook.remove()
    return logits


def logits_of(model: PreTrainedModel, dialogue: Dialogue, methods: Sequence[MethodConfig], prompt: int) -> Tensor:
    """Logits [T, V] of every row; ``prompt``: rows of the first prompt, with which VHR chooses heads."""
    model = copy.deepcopy(model).double()
    dialogue.rows = dialogue.rows.double()
    shifting = next((method for method in methods if isinstance(method, PAINT | VAR)), None)
    vhr = next((method for method in methods if isinstance(method, VHR)), None)
    factors: dict[int, list[float]] = {}
    if vhr is not None and bool(dialogue.visual.any()):
        factors = chosen(model, dialogue, vhr, prompt, shifting)
    return decoded(model, dialogue, Oracle(dialogue, shifting, factors))


def part(dialogue: Dialogue, rows: Tensor) -> Dialogue:
    """The rows of an index alone."""
    marks = None if dialogue.marks is None else dialogue.marks[rows]
    mine = (dialogue.visual[rows], dialogue.spoken[rows], dialogue.last[rows])
    hidden = {layer: gone[:, rows][:, :, rows] for layer, gone in dialogue.hidden.items()}
    return Dialogue(dialogue.rows[:, rows], dialogue.positions[..., rows], *mine, marks, hidden)


def chosen(
    model: PreTrainedModel, dialogue: Dialogue, vhr: VHR, prompt: int, shifting: MethodConfig | None
) -> dict[int, list[float]]:
    """The factor of every head: layer after layer, both passes from the beginning with what was chosen so far."""
    index = torch.arange(prompt)
    whole, text = part(dialogue, index), part(dialogue, index[~dialogue.visual[:prompt]])
    text.positions = torch.arange(text.rows.shape[1]).expand(text.positions.shape)
    factors: dict[int, list[float]] = {}
    for layer in vhr.acting_layers(len(layers_of(model))):
        real, blind = Oracle(whole, shifting, factors), Oracle(text, None, factors if vhr.both else {})
        decoded(model, whole, real)
        decoded(model, text, blind)
        seen, alone = real.outputs[layer][0, -1], blind.outputs[layer][0, -1]
        change = [float((a - b).square().sum()) ** 0.5 for a, b in zip(seen, alone, strict=True)]
        active = [float(b.square().sum()) for b in alone]
        if vhr.discard:
            surging = [
                c > statistics.mean(change) + statistics.stdev(change)
                and t > statistics.mean(active) + statistics.stdev(active)
                for c, t in zip(change, active, strict=True)
            ]
            change = [0.0 if s else c for c, s in zip(change, surging, strict=True)]
        middle = statistics.median(change)
        factors[layer] = [vhr.alpha if c > middle else 1.0 for c in change]
    return factors
