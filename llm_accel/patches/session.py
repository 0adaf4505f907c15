"""The state of one cache: hung on it, handed down the forward pass as a keyword argument, and nowhere else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_accel.cache import AccelLayer, GroupedLayer, RelativeSlotLayer
from llm_accel.cache.attention import Softmax
from llm_accel.cache.layer import CallStage
from llm_accel.cache.linear import LinearLayer, has_seen_tokens, state_bytes
from llm_accel.errors import ConfigError, EvictionError, UnsupportedCallError, UnsupportedModelError
from llm_accel.methods import ContextCompression, Depth, PromptView, StepEviction
from llm_accel.methods.selection import real_slots
from llm_accel.patches.context import Context
from llm_accel.patches.phase import Phase
from llm_accel.patches.rotary import Rotary
from llm_accel.patches.vision.grounding import grounding_of
from llm_accel.patches.vision.state import VisualState
from llm_accel.report import LayerReport

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from llm_accel.patches.compiled.cache import GraphCache
    from llm_accel.patches.plan import Plan


class Session:
    """Opaque on purpose: neither a mapping nor a list and without ``.to``, so that accelerate passes it through.

    Attributes:
        plan: what the methods do to this model.
        ours: those of the cache's layers that are ours, by index.
        prompt_end: logical length at which the prompt is complete; None when nobody announced it.
        phase: what the running call does to the cache.
        passing: whether the cache serves the running call only, which was to have none.
        visual: what became of visual tokens.
        padding: leading padding tokens of each row, int64 [B], where the running call tells them, else None.
        rotary: the model's rotary embedding, for methods whose positions are ranks in the cache, else None.
        arrived_at: positions of the running call's tokens in such methods, int64 [B, T], else None.
        protect: prompt positions that must stay, bool [B, n], or None.
        headroom: tokens that will be decoded after the prompt, where that was announced, else None.
        eager_because: why this cache's decode steps must not be compiled, or None.
        graph: the layers in their fixed form, between compiled decode steps, else None.
        lock: held during a compiled step and by whoever ends the fixed form of the layers.
        unfinished: whether a call has begun and has not come to its end.
        reading: whether the prompt is read for another cache, and ``outcome`` is to be remembered.
        outcome: the decoder's output for the last token, [B, 1, hidden], where that is so.
        context: tokens of the first prompt, for methods that have the model read them again, else None.
        views: of each layer whose prompt is complete what a method sees that evicts in all layers together.
        torn: whether an eviction of all layers together has begun and has not come to its end.
    """

    def __init__(self, plan: Plan, cache: Cache) -> None:
        self.plan = plan
        self.layers = cache.layers
        self.ours = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, AccelLayer)}
        self.prompt_end: int | None = None
        self.phase = Phase.PREFILL_CHUNK
        self.passing = False
        self.visual = VisualState()
        self.padding: Tensor | None = None
        self.protect: Tensor | None = None
        self.rotary: Rotary | None = None
        self.arrived_at: Tensor | None = None
        self.headroom: int | None = None
        self.eager_because: str | None = None
        self.graph: GraphCache | None = None
        self.unfinished = False
        self.reading = False
        self.outcome: Tensor | None = None
        self.context: Context | None = None
        self.torn = False
        self.views: dict[int, PromptView] = {}
        self._awaiting_decode = False
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        self.end_graph()
        return {name: content for name, content in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    def end_graph(self, broken: bool = False) -> None:
        """Eager calls go on from here; ``broken``: after a step that failed half-way, which the next call must find
        out."""
        with self.lock:
            graph, self.graph = self.graph, None
            if broken:
                for layer in self.ours.values():
                    layer.stage = CallStage.ARRIVED
            if graph is not None:
                graph.end()

    @property
    def decoding(self) -> bool:
        """Whether the prompt is complete and compressed, so that a call with one token is a plain decode step."""
        first = next(iter(self.ours.values()))
        begun = first.cumulative_length > 0 and first.stage is not CallStage.ARRIVED
        return begun and not self._awaiting_decode and not self._prompt_open(first.get_seq_length())

    def entries_for(
        self, module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[int | None, AccelLayer | None]:
        """Which layer of the model an attention call belongs to, and which layer of ours holds the entries it reads:
        None where that is not ours. A layer that keeps none of its own reads those of an earlier one.

        Raises:
            UnsupportedModelError: attention was given what the cache does not hold, or adds something to the mask.
        """
        index: int | None = getattr(module, "layer_idx", None)
        own = None if index is None else self.ours.get(index)
        found = None if index is None or own is None or not self._gave(index, own, key, value) else (index, own)
        if found is None:
            found = next(((i, layer) for i, layer in self.ours.items() if self._gave(i, layer, key, value)), None)
        if found is None and own is None:
            return index, None
        if found is None or mask is not None:
            why = "is not given the keys and values that its cache holds" if found is None else "adds a mask of its own"
            raise UnsupportedModelError(
                f"the attention of layer {index} ({type(module).__name__}) {why}, so nothing may be evicted there. "
                "Remove the plug-in and report the model class."
            )
        source, layer = found
        return (source if layer.stage is CallStage.ARRIVED else index), layer

    def _gave(self, index: int, layer: AccelLayer, key: Tensor, value: Tensor) -> bool:
        """Whether ``key`` and ``value`` come from this layer in the running call."""
        if layer.given is None:
            return False
        if index in self.plan.derived:
            return key.shape[2] == value.shape[2] == layer.given[0].shape[2]
        return layer.given[0] is key and layer.given[1] is value

    def announce(self, prompt_end: int, protect: Tensor | None) -> None:
        """Tells the session how long the prompt will be, so that chunks of it can be recognised."""
        if protect is not None and not (torch.is_tensor(protect) and protect.ndim == 2):
            shape = tuple(protect.shape) if torch.is_tensor(protect) else type(protect).__name__
            raise ConfigError(f"protect_mask is {shape}; give a bool tensor [batch, prompt length].")
        if protect is not None and self.plan.kv_method is None:
            raise ConfigError(f"protect_mask: {self.plan.title} does not choose entries, so it cannot protect any.")
        if protect is not None and self.plan.visual:
            raise UnsupportedCallError(
                f"protect_mask counts the tokens of the prompt, of which {self.plan.title} takes some out; "
                "leave one of them out."
            )
        kv_method = self.plan.kv_method
        if protect is not None and (
            isinstance(kv_method, StepEviction) or (kv_method and kv_method.cuts_every is not None)
        ):
            raise UnsupportedCallError(
                f"protect_mask holds for the prompt, but {self.plan.title} evicts while decoding; "
                "leave one of them out."
            )
        self.prompt_end = prompt_end
        self.protect = None if protect is None else protect.bool()

    def check_rows(self, rows: int, past: int) -> None:
        """Refuses a call whose batch is not that of the cache: rows would be broadcast, or fail in some layers only."""
        held = rows if past == 0 else next(iter(self.ours.values())).rows
        if rows != held:
            raise UnsupportedCallError(
                f"the call has {rows} rows and this cache {held}; give as many, or change those of the cache "
                "(cache.batch_select_indices, cache.batch_repeat_interleave)."
            )

    def check_whole(self, past: int) -> None:
        """Refuses a cache of ``past`` seen tokens in some of whose layers a call that failed left its own."""
        torn = any(layer.stage is CallStage.ARRIVED for layer in self.ours.values())
        stopped = self.unfinished or any(layer.refused for layer in self.ours.values())
        torn = torn or (self.torn and past > 0) or (stopped and any(map(_may_be_ahead, self.layers)))
        if torn or any(layer.get_seq_length() != past for layer in self.ours.values()):
            raise UnsupportedCallError("an earlier call on this cache failed half-way; start with a new cache.")

    def begin(self, length: int, past: int, attention_mask: Tensor | None) -> None:
        """Prepares one forward call of ``length`` new tokens after ``past`` seen ones."""
        self.check_whole(past)
        for layer in self.ours.values():
            layer.await_entries()
        if not torch.compiler.is_compiling():  # a graph is made for one mode of autograd
            for held in self.layers:
                if isinstance(held, AccelLayer | LinearLayer):
                    held.thaw()
        kv_method = self.plan.kv_method
        if past == 0:
            self._forget()
        if length > 1 or past == 0 or self._prompt_open(past):
            complete = self.prompt_end is None or past + length >= self.prompt_end
            self.padding = self._read_padding(length, past, attention_mask)
            if self.prompt_end is not None and self.padding is not None:  # by generate, which will decode
                self.plan.check_lengths(self.prompt_end - self.padding)
            if complete:
                self.prompt_end = None
            if complete and kv_method is not None and kv_method.deferred:
                self._awaiting_decode, complete = True, False
            self.phase = Phase.PREFILL_END if complete else Phase.PREFILL_CHUNK
        else:
            padding, self.padding = next(iter(self.ours.values())).padding, None
            if padding is not None and self.phase is Phase.PREFILL_END:
                self.plan.check_lengths(past - padding)
            self.phase = Phase.DEFERRED_EVICTION if self._awaiting_decode else Phase.DECODE
            self._awaiting_decode = False

    def rank_positions(self, decoder: Any, inputs: Tensor, past: int, given: Tensor | None) -> Tensor:
        """Positions of the new tokens where positions are ranks in the cache, int64 [B, T]; a first prompt keeps those
        that it was given, or that the model would count."""
        batch, length = inputs.shape[:2]
        ranked = next(layer for layer in self.ours.values() if isinstance(layer, RelativeSlotLayer))
        if past > 0:
            given = ranked.next_positions(length)
        elif given is None:
            given = torch.arange(length, device=inputs.device)[None]
        self.rotary = Rotary(decoder)
        self.arrived_at = given.expand(batch, -1)
        return self.arrived_at

    def _forget(self) -> None:
        """An emptied cache starts over: nothing of its earlier prompt counts, only what was announced for this one."""
        self._awaiting_decode = self.torn = False
        self.views = {}
        self.context = Context() if isinstance(self.plan.kv_method, ContextCompression) else None
        if self.prompt_end is None:
            self.protect = None

    def _prompt_open(self, past: int) -> bool:
        return self.prompt_end is not None and past < self.prompt_end

    def _read_padding(self, length: int, past: int, attention_mask: Tensor | None) -> Tensor | None:
        if attention_mask is None:
            return None
        real = attention_mask.bool()
        if bool(real.all()):
            return None
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise UnsupportedCallError(
                "attention_mask has padding after a real token; pad on the left (tokenizer.padding_side = 'left')"
                " and leave no gaps between turns."
            )
        padding = (~real).sum(-1)
        if self.any_shortened() or (past > 0 and not self._any_padded()):
            if bool((~real[:, -length:]).any()):
                raise UnsupportedCallError(
                    "a later turn on this cache is padded; give rows whose new tokens have equal length."
                )
            return None
        return padding

    @property
    def pictured(self) -> bool:
        """Whether a prompt with visual tokens is complete."""
        return any(layer.pictured for layer in self.ours.values())

    @property
    def any_scaled(self) -> bool:
        """Whether a method has decided how heads of this cache are scaled."""
        return any(layer.factors is not None for layer in self.ours.values())

    def any_shortened(self) -> bool:
        """Whether some layer of this cache has evicted entries or never got some of the tokens."""
        return any(layer.compressed or layer.removed for layer in self.ours.values())

    def _any_padded(self) -> bool:
        return any(layer.start is not None for layer in self.ours.values())

    def protected_slots(self, index: int, layer: AccelLayer, slots: int) -> Tensor | None:
        """``protect`` for the slots of layer ``index`` before its first eviction, bool [B, slots], or None."""
        kv_method = self.plan.kv_method
        if self.protect is None or kv_method is None or layer.compressed:
            return None
        if self.protect.shape[1] > slots:
            raise ConfigError(
                f"protect_mask covers {self.protect.shape[1]} tokens, the prompt has {slots}; "
                "give [batch, prompt length]."
            )
        rows, left = divmod(layer.keys.shape[0], self.protect.shape[0])
        if left:
            raise ConfigError(
                f"protect_mask has {self.protect.shape[0]} rows, the batch {layer.keys.shape[0]}; "
                "give [batch, prompt length]."
            )
        mask = self.protect.to(layer.keys.device).repeat_interleave(rows, dim=0)
        mask = torch.nn.functional.pad(mask, (0, slots - mask.shape[1]))
        real = real_slots(layer.start, slots, mask.device)
        mask = mask & real
        lengths = real.sum(-1)
        kept = kv_method.layer_entries_per_row(lengths, self.plan.depth(index, later=False))
        crowded = (mask.sum(-1) + kv_method.reserved > kept) & (kept < lengths)
        if bool(crowded.any()):
            row = int(crowded.long().argmax())
            raise ConfigError(
                f"protect_mask marks {int(mask[row].sum())} tokens of row {row}, but {kv_method.spec()} keeps "
                f"{int(kept.expand(len(mask))[row])} entries there in layer {index}, of which {kv_method.reserved} are "
                f"taken ({kv_method.reserved_for}); protect fewer tokens or raise the budget."
            )
        return mask

    def prompt_view(
        self,
        index: int,
        layer: AccelLayer,
        key: Tensor,
        softmax: Softmax,
        *,
        query: Tensor,
        scores: Tensor | None,
        depth: Depth | None = None,
        **more: Any,
    ) -> PromptView:
        """What a KV method sees of layer ``index``: all its keys, [B, H, P, D], and the queries that it observes;
        ``more`` are further fields of the view."""
        return PromptView(
            query=query,
            key=key,
            kv_heads=layer.kv_heads,
            start=layer.start,
            layer=index,
            layers=self.plan.layers,
            protected=self.protected_slots(index, layer, key.shape[2]),
            scores=scores,
            depth=depth or self.plan.depth(index, later=layer.compressed),
            heads=self.plan.heads,
            **softmax,
            **more,
        )

    def verify_attention(self) -> None:
        """Raises :class:`EvictionError` if a layer computed its attention without us."""
        for index, layer in self.ours.items():
            if layer.stage is CallStage.ARRIVED:
                raise EvictionError(
                    f"the attention of layer {index} never reached llm_accel: nothing is evicted there and padding is "
                    "not hidden. Remove the plug-in and report the model class."
                )
            if layer.reading is not None:
                raise EvictionError(f"{layer.reading.left} layers that read the entries of layer {index} never did.")

    def verify(self) -> None:
        """Raises :class:`EvictionError` if the prompt is complete and a layer over budget evicted nothing."""
        self.unfinished = False
        if self.phase not in (Phase.PREFILL_END, Phase.DEFERRED_EVICTION):
            return
        for index, layer in self.ours.items():
            if isinstance(layer, GroupedLayer) and self.plan.split is not None and layer.stream.heads:
                limit, held = self.plan.split.sinks + self.plan.split.recent, layer.stream.store.physical_length()
                if held > limit:
                    raise EvictionError(f"layer {index} streams {limit} entries per head, but holds {held}.")
        kv_method = self.plan.kv_method
        if kv_method is None or kv_method.layers_compete:  # such a method evicts in all layers or raises
            return
        for index, layer in self.ours.items():
            if index in self.plan.skipped or layer.compressed:
                continue
            # the first decoded token is no part of the prompt
            seen = layer.cumulative_length - int(self.phase is Phase.DEFERRED_EVICTION)
            entries = kv_method.layer_entries(seen, self.plan.depth(index, later=False))
            if entries < seen:
                raise EvictionError(
                    f"layer {index} has seen {seen} tokens and should keep {entries}, but evicted nothing."
                )

    def layer_reports(self) -> list[LayerReport]:
        """What each layer holds now."""
        with self.lock:
            self.end_graph()
            return [self._layer_report(index, layer) for index, layer in enumerate(self.layers)]

    def _layer_report(self, index: int, layer: object) -> LayerReport:
        report = LayerReport(index, skipped_reason=self.plan.skipped.get(index), state_bytes=state_bytes(layer))
        if isinstance(layer, AccelLayer):
            if layer.physical_length():
                report.logical_length = layer.get_seq_length()
                report.physical_length = layer.physical_length()
                report.kv_bytes = layer.nbytes()
                report.dense_kv_bytes = layer.token_bytes() * report.logical_length
                report.evicted = report.logical_length - layer.mean_length()
                report.sparse_calls = getattr(layer, "sparse_calls", 0)
                report.kept = layer.kept_positions() if self.plan.trace else None
                report.grounding = grounding_of(self.plan, layer)
            return report
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and keys.numel():
            report.logical_length = int(layer.get_seq_length())  # type: ignore[attr-defined]
            report.physical_length = keys.shape[-2]
            report.kv_bytes = report.dense_kv_bytes = keys.nbytes + values.nbytes
        return report


def _may_be_ahead(layer: Any) -> bool:
    """Whether a call that failed may have left something in this layer which its length does not show."""
    if isinstance(layer, AccelLayer) and layer.reading is not None:
        return True
    stock = not isinstance(layer, AccelLayer) and getattr(layer, "keys", None) is not None
    return has_seen_tokens(layer) or (stock and layer.get_seq_length() > 0)
