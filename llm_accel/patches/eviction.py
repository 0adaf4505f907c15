"""When and how the entries of one layer are scored and evicted within one attention call."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.cache import AccelLayer, HidingLayer, SlotLayer
from llm_accel.cache.attention import Attention
from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods.attention import AttentionView
from llm_accel.methods.prompt_view import Depth, PromptView
from llm_accel.methods.roles import ScoreAndKeep, StepEviction, StepView
from llm_accel.methods.selection import without
from llm_accel.patches.attention_lse import with_lse
from llm_accel.patches.phase import Phase
from llm_accel.patches.session import Session


class Eviction:
    """The work of a score-and-keep method on one layer in the running call.

    Args:
        session: state of the cache.
        method: the method.
        layer: the layer's entries, the new ones included.
        index: index of the layer.
        attention: what the model would have computed.
    """

    def __init__(
        self, session: Session, method: ScoreAndKeep, layer: AccelLayer, index: int, attention: Attention
    ) -> None:
        self.session, self.method, self.layer, self.index, self.attention = (
            session,
            method,
            layer,
            index,
            attention,
        )
        self.closing = (
            session.phase is Phase.PREFILL_END
        )  # set to cut at the end of a chunk; slots are overwritten after the prompt only

    def before_attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Deferred compression: evicts from the prompt, keeps the new token, returns what attention may see."""
        stored = self.layer.physical_length()
        prompt, window = stored - query.shape[2], self.layer.window
        if not self._over_budget(newest=query.shape[2]):
            self.layer.window = window if self.method.cuts_every else None
            return key, value
        kept = self._select(window, self.layer.all_keys(key)[:, :, :prompt])
        newest = torch.arange(prompt, stored, device=kept.device).expand(*kept.shape[:2], -1)
        kept = torch.cat([kept, newest], dim=-1)
        self.layer.keep(kept, self.session.plan.trace)
        self.layer.window = window if self.method.cuts_every else None
        return self.layer.narrowed(kept, key, value)

    def attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """A decode step in which the method computes attention and eviction together, [B, 1, Hq, Dv]; None where the
        model computes attention."""
        method, layer = self.method, self.layer
        decoding = query.shape[2] == 1 and not self.closing and not query.requires_grad
        if not (decoding and isinstance(method, StepEviction) and isinstance(layer, SlotLayer) and layer.full):
            return None  # while nothing is evicted, the output is the model's own to the bit
        softmax = self.attention.softmax(key.shape[-1])
        view = AttentionView(
            query, key, value, start=layer.start, **softmax, layer=self.index, layers=self.session.plan.layers
        )
        step = method.attend_and_choose(view, step_view(layer))
        if step is None:
            return None
        output, layer.scores, victims = step
        layer.choose_spare(victims)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's dense attention, [B, T, Hq, Dv]; with it the log-sum-exp of the rows, fp32 [B, Hq, T], where the
        scores of a prompt need that and attention computed it anyhow."""

        def dense() -> Tensor:
            return self.layer.attend(self.attention, query, key, value)

        accumulates = isinstance(self.method, StepEviction) and self.method.accumulates
        softmax = self.attention.softmax(key.shape[-1])
        plain = softmax["softcap"] is None and softmax["sinks"] is None  # the kernels of SDPA know of neither
        prompt = query.shape[2] > 1 and not torch.compiler.is_compiling()
        if accumulates and plain and prompt and isinstance(self.layer, SlotLayer):
            return with_lse(dense, query)
        return dense(), None

    def after_attention(self, query: Tensor, key: Tensor, lse: Tensor | None = None) -> None:
        """Eviction at the end of a prompt or of a decode step; before that, remembers what the scores will need.

        Args:
            lse: log-sum-exp of each query's logits, fp32 [B, Hq, T], where it is known.
        """
        if isinstance(self.method, StepEviction):
            if isinstance(self.layer, HidingLayer):
                self._hide(self.method, self.layer, query, key)
            else:
                assert isinstance(self.layer, SlotLayer)
                self._step(self.method, self.layer, query, key, lse)
        elif self.session.phase is Phase.PREFILL_END:
            self._close(query, key)
        elif self.session.phase is Phase.PREFILL_CHUNK:
            self._observed(query)
        elif self.method.cuts_every is not None:
            self._cut(self._observed(query), key, self.method.cuts_every)

    def _close(self, query: Tensor, key: Tensor) -> None:
        if self.layer.window is not None or self.method.cuts_every is not None:
            query = self._observed(query)
        if not self._over_budget():
            self.layer.own_storage()
        elif self.method.layers_compete:
            self.session.views[self.index] = self._view(query, self.layer.all_keys(key))
        else:
            self.layer.keep(self._select(query, self.layer.all_keys(key)), self.session.plan.trace)
        self.layer.window = query if self.method.observed_queries and self.method.cuts_every else None

    def _cut(self, query: Tensor, key: Tensor, every: int) -> None:
        """A decode step; the layer is cut back to its budget when it holds ``every`` entries more."""
        depth, stored = self.session.plan.depth(self.index, later=True), self.layer.mean_length()
        if stored - self.method.layer_entries(self.layer.cumulative_length, depth) >= every:
            kept = self._select(query, self.layer.all_keys(key), depth, every)
            self.layer.keep(kept, self.session.plan.trace)
            self.layer.window = query if self.method.observed_queries else None

    def _observed(self, query: Tensor) -> Tensor:
        """The last queries that the scores need, those of earlier calls and of this one."""
        if not self.method.observed_queries:
            return query
        self.layer.observe(query, self.method.observed_queries)
        assert self.layer.window is not None
        return self.layer.window

    def _step(self, method: StepEviction, layer: SlotLayer, query: Tensor, key: Tensor, lse: Tensor | None) -> None:
        if method.accumulates:
            layer.accumulate(self._votes(query, key, layer.start, lse), self._decay(method, query))
        if self.closing:
            if self._over_budget():
                layer.keep(self._select(None, key), self.session.plan.trace)
            else:
                layer.own_storage()
            if self.session.phase is Phase.PREFILL_END:
                layer.bound(method.capacity(layer.cumulative_length))
        if layer.full and self.session.phase is not Phase.PREFILL_CHUNK:  # the rest of a later turn is appended
            layer.choose_spare(method.victims(step_view(layer)))

    def _hide(self, method: StepEviction, layer: HidingLayer, query: Tensor, key: Tensor) -> None:
        """A simulated step: everything stays stored, the method says what the next token sees."""
        layer.accumulate(self._votes(query, key, layer.shown_start()), self._decay(method, query))
        if self.session.phase is Phase.PREFILL_END:
            layer.own_storage()
            lengths = layer.row_lengths().expand(key.shape[0])
            entries = None if method.ratio is None else method.entries_per_row(lengths)
            layer.bound(method.capacity(layer.physical_length()), entries)
        if layer.full:
            layer.show(self._select(None, layer.keys))

    def _votes(self, query: Tensor, key: Tensor, start: Tensor | None, lse: Tensor | None = None) -> Tensor:
        """Attention that the queries of this call pay to each entry, summed over the heads that share it."""
        softmax = self.attention.softmax(key.shape[-1])
        with torch.no_grad():  # as a decorator it would break every compiled graph
            return column_votes(query, key, start, heads=self.layer.kv_heads, group="sum", lse=lse, **softmax)

    def _decay(self, method: StepEviction, query: Tensor) -> float:
        return method.score_decay if query.shape[2] == 1 else 1.0

    def _over_budget(self, newest: int = 0) -> bool:
        """Whether some row stores more than it may keep, the ``newest`` entries aside. Budgets are counted from the
        tokens seen, so that a ratio does not shrink what a former turn has shrunk already."""
        if self.layer.compressed and not self.method.recompresses:
            return False
        depth = self._depth()
        entries = self.method.layer_entries(self.layer.cumulative_length - newest, depth)
        if entries < self.layer.mean_length() - newest:
            return True
        if self.layer.start is None:
            return False
        # a short row may have to evict where a long one, whose early layers keep more, does not
        lengths, seen = self.layer.row_lengths() - newest, self._seen(newest)
        return bool((self.method.layer_entries_per_row(lengths if seen is None else seen, depth) < lengths).any())

    def _seen(self, newest: int) -> Tensor | None:
        seen = self.layer.seen()
        return None if seen is None else seen - newest

    def _depth(self) -> Depth:
        return self.session.plan.depth(self.index, later=self.layer.compressed)

    def _view(self, query: Tensor | None, key: Tensor, depth: Depth | None = None, slack: int = 1) -> PromptView:
        width = self.method.observed_queries
        observed = key[:, :, :0] if query is None else query[:, :, -width:] if width else query[:, :, :0]
        return self.session.prompt_view(
            self.index,
            self.layer,
            key,
            self.attention.softmax(key.shape[-1]),
            query=observed,
            scores=getattr(self.layer, "scores", None),
            depth=depth,
            slack=slack,
            seen=self._seen(newest=self.layer.physical_length() - key.shape[2]),
            entries=getattr(self.layer, "entries", None),
        )

    def _select(self, query: Tensor | None, key: Tensor, depth: Depth | None = None, slack: int = 1) -> Tensor:
        view = self._view(query, key, depth, slack)
        with torch.no_grad():
            kept = self.method.select(view)
            if view.protected is not None:
                self._check_protected(kept, view.protected, view.valid)
        return kept

    def _check_protected(self, kept: Tensor, protected: Tensor, valid: Tensor) -> None:
        """Refuses what a method that chooses in a way of its own has not kept."""
        lost = without(kept, protected, valid)
        if bool(lost.any()):
            raise UnsupportedCallError(
                f"protect_mask: {self.method.spec()} let protected tokens of row {int(lost.long().argmax())} go in "
                f"layer {self.index}. {type(self.method).__name__} overrides `select`, which is what keeps them: have "
                "it give a `score(view)` instead, or call without protect_mask."
            )


def evict_together(session: Session) -> None:
    """Evicts in all layers whose views wait for those of the others."""
    views, session.views = session.views, {}
    kv_method = session.plan.kv_method
    if not views or kv_method is None:
        return
    session.torn = True  # until all layers have evicted
    with torch.no_grad():
        chosen = kv_method.select_all(list(views.values()))
    for index, kept in zip(views, chosen, strict=True):
        layer = session.ours[index]
        if layer.start is None and bool((kept < 0).any()):
            layer.start = torch.zeros(layer.rows, dtype=torch.long, device=kept.device)  # rows may differ from now on
        layer.keep(kept, session.plan.trace)
    session.torn = False


def step_view(layer: SlotLayer) -> StepView:
    """What a method sees of a layer when it chooses the next victims."""
    return StepView(layer.seen_positions(), layer.scores)
