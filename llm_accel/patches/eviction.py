"""When and how the entries of one layer are scored and evicted within one attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.roles import PromptView, ScoreAndKeep, StepEviction
from llm_accel.patches.layers import AccelLayer, SlotLayer
from llm_accel.patches.session import Session


class Eviction:
    """The work of a score-and-keep method on one layer in the running call.

    Args:
        session: state of the cache.
        keeper: the method.
        layer: the layer's entries, the new ones included.
        index: index of the layer.
        kwargs: what the model passed to its attention function (scaling, softcap, learned sinks).
    """

    def __init__(
        self, session: Session, keeper: ScoreAndKeep, layer: AccelLayer, index: int, kwargs: dict[str, Any]
    ) -> None:
        self.session, self.keeper, self.layer, self.index, self.kwargs = session, keeper, layer, index, kwargs
        self.closing = session.closing  # set to cut at the end of a chunk; slots are overwritten after the prompt only

    def before_attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Deferred compression: evicts from the prompt, keeps the new token, returns what attention may see."""
        prompt = key.shape[2] - query.shape[2]
        if not self._over_budget(prompt):
            self.layer.window = None
            return key, value
        kept = self._select(self.layer.window, key[:, :, :prompt])
        newest = torch.arange(prompt, key.shape[2], device=kept.device).expand(*kept.shape[:2], -1)
        kept = torch.cat([kept, newest], dim=-1)
        slots = kept.clamp(min=0).repeat_interleave(key.shape[1] // kept.shape[1], dim=1)[..., None]
        key = key.gather(2, slots.expand(-1, -1, -1, key.shape[-1]))
        value = value.gather(2, slots.expand(-1, -1, -1, value.shape[-1]))
        self.layer.keep(kept, self.session.plan.trace)
        return key, value

    def after_attention(self, query: Tensor, key: Tensor) -> None:
        """Eviction at the end of a prompt or of a decode step; before that, remembers what the scores will need."""
        if isinstance(self.keeper, StepEviction):
            assert isinstance(self.layer, SlotLayer)
            with torch.no_grad():  # as a decorator it would break every compiled graph
                self._step(self.keeper, self.layer, query, key)
        else:
            self._close(query, key)

    def _close(self, query: Tensor, key: Tensor) -> None:
        width = self.keeper.observed_queries
        if not self.closing:
            if width and self.session.observing:
                self.layer.observe(query, width)
        elif not self._over_budget(key.shape[2]):
            self.layer.window = None
            self.layer.own_storage()
        else:
            if width and self.layer.window is not None:
                self.layer.observe(query, width)
                query = self.layer.window
            self.layer.keep(self._select(query, key), self.session.plan.trace)

    def _step(self, keeper: StepEviction, layer: SlotLayer, query: Tensor, key: Tensor) -> None:
        if keeper.accumulates:
            votes = column_votes(query, key, layer.start, heads=layer.keys.shape[1], group="sum", **self._softmax(key))
            layer.accumulate(votes, keeper.score_decay if query.shape[2] == 1 else 1.0)
        if self.closing:
            slots = key.shape[2]
            if self._over_budget(slots):
                layer.keep(self._select(None, key), self.session.plan.trace)
            else:
                layer.own_storage()
            if self.session.closing:
                layer.bound(keeper.capacity(slots))
        if layer.full:
            layer.choose_spare(keeper.victims(layer.view()))

    def _over_budget(self, slots: int) -> bool:
        if self.layer.compressed and not self.keeper.recompresses:
            return False
        return self.keeper.entries(slots) < slots

    def _select(self, query: Tensor | None, key: Tensor) -> Tensor:
        width = self.keeper.observed_queries
        observed = key[:, :, :0] if query is None else query[:, :, -width:] if width else query[:, :, :0]
        view = PromptView(
            query=observed,
            key=key,
            kv_heads=self.layer.keys.shape[1],
            start=self.layer.start,
            layer=self.index,
            layers=self.session.plan.layers,
            protected=self.session.protected_slots(self.layer, key.shape[2]),
            scores=getattr(self.layer, "scores", None),
            **self._softmax(key),
        )
        with torch.no_grad():
            return self.keeper.select(view)

    def _softmax(self, key: Tensor) -> dict[str, Any]:
        """How the model turns logits into probabilities."""
        scaling = self.kwargs.get("scaling")
        return {
            "scaling": key.shape[-1] ** -0.5 if scaling is None else scaling,
            "softcap": self.kwargs.get("softcap"),
            "sinks": self.kwargs.get("s_aux"),
        }
