"""Heads that are scaled: a second pass of the first prompt without its image, layer by layer beside the real one, says
which; their outputs are multiplied where attention hands them on, before the output projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import HeadScaling, HeadShard
from llm_accel.methods.selection import slots_of
from llm_accel.patches.vision.arguments import layers_of
from llm_accel.patches.vision.rows import gathered, per_token
from llm_accel.patches.vision.state import VisualState

if TYPE_CHECKING:
    from llm_accel.patches.base_attention import ModelAttention
    from llm_accel.patches.session import Session


class BlindPass:
    """What the decoder is given in place of a session while it reads a prompt without its image. Opaque, as sessions
    are.

    A first pass through the whole decoder notes what every layer is called with. Where the pass is to be scaled as
    well, layers run a second time, each of them within the attention of its counterpart in the real pass: that is where
    the outputs of both are known, and none has gone further.

    Args:
        method: says how heads are scaled.
        shard: which heads are here.
        pictured: which rows have an image, bool [B]; heads of others keep their outputs.

    Attributes:
        visual: that no visual token is under way, for the hooks that ask.
    """

    def __init__(self, method: HeadScaling, shard: HeadShard, pictured: Tensor) -> None:
        self.method, self.shard, self.pictured = method, shard, pictured
        self.visual = VisualState()
        self._calls: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        self._blind: dict[int, Tensor] = {}
        self._seen: tuple[int, Tensor] | None = None  # the layer of the real pass that waits, and its outputs
        self._factors: Tensor | None = None
        self._next: int | None = None  # of the second pass: the layer that has not run, and what enters it
        self._hidden: Tensor | None = None
        self._checked: Tensor | None = None

    def entering(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer is about to run in the first pass.

        Raises:
            UnsupportedCallError: it is not given what the layer before it returned.
        """
        if self._next is not None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        before = self._checked
        if before is not None and before is not hidden and not torch.equal(before.to(hidden.device), hidden):
            raise UnsupportedCallError(
                f"{self.method.name}: the decoder changes hidden states between layers {index - 1} and {index}, so a "
                "pass without the image cannot be run layer by layer; give both=False."
            )
        self._calls[index] = (block, args, kwargs)

    def left(self, output: Any) -> None:
        """A layer has run."""
        self._checked = output[0] if isinstance(output, tuple) else output

    def attend(
        self, attention: ModelAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer without the image, [B, T, Hq, Dv]."""
        output = attention.plain(query, key, value, mask)
        index: int = attention.module.layer_idx  # type: ignore[assignment]
        if self._seen is None:
            if not self.method.scales_both:
                self._blind[index] = output[:, -1].clone()
            return output
        waiting, seen = self._seen
        if index != waiting:
            return output
        self._factors = self._compared(seen, output[:, -1])
        return scaled(output, self._factors)

    @torch.no_grad()
    def choose(self, index: int, seen: Tensor) -> Tensor:
        """The factors of the heads of a layer, fp32 [B, Hq], from their outputs for the last token of the real pass,
        [B, Hq, Dv]. Layers come in their order."""
        if not self.method.scales_both:
            return self._compared(seen, self._blind.pop(index))
        if self._next is None:
            self._next = index
        for layer in range(self._next, index + 1):
            self._seen = (index, seen)
            self._run(layer)
        self._next = index + 1
        factors, self._factors = self._factors, None
        assert factors is not None
        return factors

    def _run(self, layer: int) -> None:
        block, args, kwargs = self._calls.pop(layer)
        if self._hidden is not None:
            if args:
                args = (self._hidden, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": self._hidden}
        output = block(*args, **kwargs)
        self._hidden = output[0] if isinstance(output, tuple) else output

    def _compared(self, seen: Tensor, blind: Tensor) -> Tensor:
        factors = self.method.factors(self.shard.every(seen), self.shard.every(blind.to(seen.device)))
        pictured = self.pictured.to(factors.device)
        return self.shard.mine(torch.where(pictured[:, None], factors, torch.ones_like(factors)))


class BlindEntry:
    """Forward pre-hook of a decoder layer."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells a pass without the image what the layer is called with."""
        blind = kwargs.get("llm_accel")
        if isinstance(blind, BlindPass):
            blind.entering(self.layer, block, args, kwargs)


class BlindExit:
    """Forward hook of a decoder layer."""

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Tells it what the layer returned."""
        blind = kwargs.get("llm_accel")
        if isinstance(blind, BlindPass):
            blind.left(output)


def scaled(output: Tensor, factors: Tensor) -> Tensor:
    """Outputs of heads [B, T, Hq, Dv] times their factors, [B, Hq]."""
    return output * factors[:, None, :, None].to(output)


def begin_blind_pass(session: Session, decoder: Any, kwargs: dict[str, Any]) -> None:
    """Before the first call that brings visual tokens to a cache: reads the same prompt without them.

    Args:
        session: state of the cache, its call begun and the rows that stay known.
        kwargs: arguments of the decoder.

    Raises:
        UnsupportedCallError: the prompt is not there as a whole, or has nothing but its image, or ends with it.
    """
    method, rows = session.plan.head_scaling, session.visual.rows
    session.visual.blind = None
    if method is None or rows is None or session.any_scaled:
        return
    title = method.spec()
    if rows.visual is None:
        raise UnsupportedCallError(f"{title} must know which tokens are visual; give input_ids, not inputs_embeds.")
    pictured = rows.visual.any(-1)
    if not bool(pictured.any()):
        return
    if session.visual.past > 0 or session.prompt_end is not None:
        raise UnsupportedCallError(
            f"{title} chooses heads on the whole prompt up to its first answer, and here that comes in several calls; "
            "leave out prefill_chunk_size, or show the image in the first turn of a new cache."
        )
    if bool(rows.visual[:, -1].any()):
        raise UnsupportedCallError(
            f"{title} compares what heads give for the last token of the prompt, with the image and without, and here "
            "that token is one of the image; put the question behind it."
        )
    session.visual.blind = BlindPass(method, session.plan.heads, pictured)
    with torch.no_grad():
        decoder.forward(
            **_without_image(rows, kwargs), llm_accel=session.visual.blind
        )  # hooks are for its user's calls


def _without_image(rows: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the decoder for the same rows without visual tokens, which are numbered anew."""
    index = slots_of((rows.real & ~rows.visual)[:, None])[:, 0]
    mask = index >= 0
    positions, given = (mask.long().cumsum(-1) - 1).clamp(min=0), kwargs.get("position_ids")
    if given is not None and given.ndim == 3:
        positions = positions.expand(given.shape[0], *positions.shape)
    return {
        "inputs_embeds": gathered(kwargs["inputs_embeds"], index, 0.0),
        "attention_mask": mask.long(),
        "position_ids": positions,
        "use_cache": False,
        **per_token(kwargs, index),
    }


def scale_heads(session: Session, index: int, layer: Any, output: Tensor) -> Tensor:
    """The output of attention [B, T, Hq, Dv] with its heads scaled, where a method does that; the factors stay with the
    entries of the layer."""
    blind = session.visual.blind
    if blind is not None and index in session.plan.scaled_layers:
        layer.factors = blind.choose(index, output[:, -1])
    return output if layer.factors is None else scaled(output, layer.factors)


def install_blind_pass(decoder: Any) -> None:
    """Hooks the layers of a decoder."""
    for index, block in enumerate(layers_of(decoder)):
        block.register_forward_pre_hook(BlindEntry(index), with_kwargs=True)
        block.register_forward_hook(BlindExit(), with_kwargs=True)
