"""One sample: what its answer becomes when visual tokens leave after each layer, from one forward pass.

The text rows that a layer outputs run through the following layers once more, alone and at their positions. For text
this is the same as masking the keys of visual rows in those layers, at the cost of T * L (L - 1) / 2 token-layers for T
text rows: less than two forward passes where an image has 576 tokens and the text 80.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.visual.routers import text_features
from llm_accel.patches.families import VisionFamily

AGREE = 0.99  # share of the answer's tokens that must stay the most likely ones: all, in answers under 100 tokens
WORSE = 1.03  # factor that the loss of the answer must stay below
_ROW_PER_TOKEN = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


@dataclass(frozen=True)
class Observation:
    """One sample."""

    loss: float  # mean loss of the answer in the full model, nats per token
    losses: tuple[float, ...]  # the same by exit layer, from the first allowed one to the last but one
    agreement: tuple[float, ...]  # share of the answer's tokens that stay the most likely ones, of the same layers
    features: Tensor  # the inputs of the routers after these layers, fp32 [layers, 2 C]


def safe_exits(
    loss: float, losses: Sequence[float], agreement: Sequence[float], slack: float = 0.0
) -> tuple[bool, ...]:
    """Which exits leave an answer as it was: the same tokens are the most likely ones, and the loss stays below 1.03
    times that of the full model, or within ``slack`` nats of it."""
    return tuple(
        same > AGREE and (after < WORSE * loss or after <= loss + slack)
        for after, same in zip(losses, agreement, strict=True)
    )


@torch.no_grad()
def observe(model: Any, inputs: Mapping[str, Tensor], answer: Tensor, family: VisionFamily) -> Observation:
    """Measures every exit on one sample.

    Args:
        model: an unpatched vision-language model.
        inputs: what its processor makes of one image and prompt, a batch of one row without padding.
        answer: int64 [A], tokens that follow the prompt.

    Raises:
        ConfigError: the prompt has no image, or fewer than two text tokens behind its last one.
    """
    marks = torch.tensor([getattr(model.config, name) for name in family.token_ids], device=model.device)
    whole = _with_answer(inputs, answer)
    ids = whole["input_ids"]
    visual = torch.isin(ids, marks)[0]
    prompt, length = int(ids.shape[1] - len(answer)), int(ids.shape[1])
    if not bool(visual.any()):
        raise ConfigError("it has no image; every sample must have one, with its placeholders in input_ids.")
    last = int(visual.nonzero()[-1])
    if prompt - last < 3:
        raise ConfigError("fewer than two text tokens stand behind its last image, where routers look.")
    text = (~visual).nonzero()[:, 0]
    question = (text > last) & (text < prompt)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with _recording(decoder, text) as seen:
        logits = model(**whole, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    target = answer.to(logits.device)
    loss, best = float(F.cross_entropy(logits, target)), logits.argmax(-1)
    positions = seen.positions
    if positions is None:
        positions = torch.arange(length, device=ids.device)[None]
    given = {
        "position_ids": positions[..., text],
        # without a mask, gaps between positions would be taken for borders of packed sequences
        "attention_mask": torch.ones(1, len(text), dtype=torch.long, device=ids.device),
        "use_cache": False,
    }
    first = family.first_cut(model.config)
    losses, agreement, features = [], [], []
    for layer, rows in enumerate(seen.outputs[:-1]):
        if layer < first:
            continue
        behind = rows[:, question.to(rows.device)]
        everything = torch.ones(behind.shape[:2], dtype=torch.bool, device=behind.device)
        features.append(text_features(behind, ~everything, everything)[0][0].cpu())
        with _only_behind(decoder, layer):
            hidden = decoder(inputs_embeds=rows, **given).last_hidden_state
        exited = head(hidden[:, -len(answer) - 1 : -1])[0].float()
        losses.append(float(F.cross_entropy(exited, target.to(exited.device))))
        agreement.append(float((exited.argmax(-1) == best.to(exited.device)).float().mean()))
    return Observation(loss, tuple(losses), tuple(agreement), torch.stack(features))


def _with_answer(inputs: Mapping[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs of one forward call over prompt and answer."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.bool().all())):
        raise ConfigError(f"its input_ids are {list(ids.shape)}; give one row per sample, without padding.")
    whole = dict(inputs) | {"input_ids": torch.cat([ids, answer.to(ids)[None]], dim=1)}
    for name, value in _ROW_PER_TOKEN.items():
        if name in whole:
            whole[name] = F.pad(whole[name], (0, len(answer)), value=value)
    return whole


class _Seen:
    """What a forward pass of the decoder used: its position ids, and the text rows that each layer output."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.outputs: list[Tensor] = []


@contextmanager
def _recording(decoder: Any, text: Tensor) -> Iterator[_Seen]:
    seen = _Seen()

    def record_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.positions = kwargs.get("position_ids")

    def record_rows(module: Any, args: tuple[Any, ...], output: Any) -> None:
        rows = output[0] if isinstance(output, tuple) else output
        seen.outputs.append(rows[:, text.to(rows.device)])

    hooks = [decoder.register_forward_pre_hook(record_positions, with_kwargs=True)]
    hooks += [layer.register_forward_hook(record_rows) for layer in decoder.layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only_behind(decoder: Any, layer: int) -> Iterator[None]:
    """The decoder runs only the layers after ``layer``; masks, rotary embeddings and the last norm stay its own."""
    stock = decoder.layers
    decoder.layers = stock[layer + 1 :]
    try:
        yield
    finally:
        decoder.layers = stock
