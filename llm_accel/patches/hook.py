"""The forward hooks on the decoder: they attach a session to the cache and hand its session down."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache

from llm_accel.cache.linear import beside_state, own_state
from llm_accel.cache.stock import is_full
from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import StepEviction
from llm_accel.patches.attention import accel_name, register
from llm_accel.patches.cache_name import CACHE, named, named_cache
from llm_accel.patches.compiled.call import arm
from llm_accel.patches.context import compress_context
from llm_accel.patches.contrast import note_call
from llm_accel.patches.eviction import evict_together
from llm_accel.patches.mlp_chunks import arm_mlps
from llm_accel.patches.phase import Phase
from llm_accel.patches.plan import Plan
from llm_accel.patches.recording import Recording
from llm_accel.patches.replay import Replay, is_waiting, replayed, wants
from llm_accel.patches.session import Session
from llm_accel.patches.vision.head_scaling import begin_blind_pass
from llm_accel.patches.vision.rows import begin_call
from llm_accel.patches.vision.state import VisualReport
from llm_accel.patches.vision.watch import MARKS
from llm_accel.patches.vision.weight_shift import check_marks
from llm_accel.report import LayerReport


class DecoderHook:
    """Forward pre-hook of the decoder. A picklable object: a copied or reloaded model keeps its own.

    Attributes:
        plan: what the methods do to this model.
        enabled: False inside ``Handle.disabled()``.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.enabled = True
        self._latest: weakref.ref[Session] | None = None
        self._settled: list[LayerReport] = []
        self._visual = VisualReport()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": None, "_settled": [], "_visual": VisualReport()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.plan.base)  # a model that is loaded in another process finds its attention there

    def __call__(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Finds or makes the session of this call and passes it on as ``llm_accel``."""
        if args:
            args, kwargs = (), named(type(decoder).forward, args, kwargs)
        kwargs = named_cache(kwargs)
        cache = kwargs.get(CACHE)
        visual, marks = kwargs.pop("llm_accel_visual", None), kwargs.pop(MARKS, None)
        if not self.enabled:
            if isinstance(cache, Cache) and session_of(cache) is not None:
                raise UnsupportedCallError(
                    "this cache belongs to the plug-in; inside disabled() start with a new cache."
                )
            return args, kwargs
        passing = False
        if cache is None:
            use_cache = kwargs.get("use_cache")
            cached = decoder.config.use_cache if use_cache is None else use_cache
            without_cache = self.plan.mask is not None or self.plan.attention_method is not None
            without_cache = without_cache or self.plan.visual or self.plan.grounds
            if decoder.training or not (cached or without_cache):
                return args, kwargs  # nothing is kept, so there is nothing to evict
            passing = not cached
            cache = kwargs[CACHE] = DynamicCache(config=decoder.config)
        self._keep_implementation(decoder)
        arm(decoder, self)  # a copied or reloaded model has lost its own
        arm_mlps(decoder, self)
        _refuse(kwargs, decoder, self.plan)
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if isinstance(cache, Recording) and inputs is not None:
            return args, cache.begin(inputs, kwargs)
        session = attach_session(cache, self.plan, decoder.config)
        if is_waiting(cache):
            return args, replayed(cache, decoder, kwargs)
        session.passing = passing
        if inputs is None:
            return args, kwargs  # the model itself says what is missing
        length, past = inputs.shape[1], cache.get_seq_length()
        session.check_rows(inputs.shape[0], past)
        session.begin(length, past, kwargs.get("attention_mask"))
        if session.context is not None and session.phase.in_prompt:
            session.context.add(inputs, kwargs)
        if isinstance(self.plan.kv_method, StepEviction) and self.plan.kv_method.relative_positions:
            kwargs["position_ids"] = session.rank_positions(decoder, inputs, past, kwargs.get("position_ids"))
        if self.plan.family is not None:
            kwargs = begin_call(session, kwargs, visual, past, marks)
            check_marks(session)
            begin_blind_pass(session, decoder, kwargs)
        if self.plan.decoding is not None:
            note_call(session, self.plan.decoding, kwargs)
        self._latest = weakref.ref(session)
        session.unfinished = True
        kwargs["llm_accel"] = session
        return args, kwargs

    def _keep_implementation(self, decoder: Any) -> None:
        """Two models may share one configuration object; removing the plug-in from the other one resets the name."""
        config, name = decoder.config, accel_name(self.plan.base)
        current = config._attn_implementation
        if current == name:
            return
        if current != self.plan.base:
            raise UnsupportedCallError(
                f"the attention implementation was changed to {current!r} after llm_accel.apply; "
                "call llm_accel.remove(model), change it, then apply again."
            )
        config._attn_implementation_internal = name

    def settle(self, session: Session) -> None:
        """Keeps the report of a finished generate call, whose cache may be gone soon."""
        self._settled, self._visual = session.layer_reports(), session.visual.report()
        self._latest = weakref.ref(session)

    def layer_reports(self) -> list[LayerReport]:
        """Reports of the latest cache while it lives, else of the latest finished call."""
        session = self._latest() if self._latest is not None else None
        return self._settled if session is None else session.layer_reports()

    def visual_report(self) -> VisualReport:
        """The same for visual tokens."""
        session = self._latest() if self._latest is not None else None
        return self._visual if session is None else session.visual.report()


class DecoderExit:
    """Forward hook of the decoder: makes sure that what should have been evicted was."""

    def __call__(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises :class:`llm_accel.errors.EvictionError` if a layer over budget evicted nothing."""
        session = kwargs.get("llm_accel")
        if isinstance(session, Replay):
            session.hand_over(output)
            return
        if isinstance(session, Recording):
            session.outcome = output.last_hidden_state[:, -1:].clone()
            return
        if session is None:
            return
        session.visual.blind = None
        end_call(session, decoder)
        if session.reading:
            session.outcome = output.last_hidden_state[:, -1:].clone()
        if session.passing:
            output[CACHE] = None  # the caller asked for none, and would take it for that of the next call


def end_call(session: Session, decoder: nn.Module) -> None:
    """What is due once all layers have had a call. Raises :class:`llm_accel.errors.EvictionError` if a layer over
    budget evicted nothing."""
    session.verify_attention()
    if session.context is not None and session.phase is Phase.PREFILL_END:
        compress_context(session, decoder)
    evict_together(session)
    session.verify()


def session_of(cache: Cache) -> Session | None:
    """The session hung on a cache, if any."""
    return getattr(cache, "llm_accel", None)


def attach_session(cache: Any, plan: Plan, config: Any) -> Session:
    """Turns the stock, empty full-attention layers of a cache into ours, in place. A cache without layers gets those
    of ``config``: only they tell sliding layers from full ones."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise UnsupportedCallError(
            f"{CACHE} is a {type(cache).__name__}; give a transformers Cache or none, or handle.new_cache()."
        )
    session = session_of(cache)
    if session is not None:
        if session.plan is not plan and session.plan != plan:
            raise UnsupportedCallError(
                f"this cache was filled with {session.plan.title}, the model now runs {plan.title}; "
                "start with a new cache."
            )
        return session
    if isinstance(cache, StaticCache | QuantizedCache) or cache.offloading:
        kind = f"offloaded {type(cache).__name__}" if cache.offloading else type(cache).__name__
        raise UnsupportedCallError(f"a {kind} cannot be compressed; pass no cache or handle.new_cache().")
    if not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
        cache.layer_class_to_replicate = None
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if not is_full(layer):
            layers[index] = own_state(layer)
            continue
        if layer.get_seq_length() > 0:
            raise UnsupportedCallError(
                "this cache was filled before llm_accel.apply; start with an empty one (handle.new_cache())."
            )
        layers[index] = beside_state(plan.make_layer(index), layer)
    session = Session(plan, cache)
    cache.llm_accel = session  # type: ignore[attr-defined]
    return session


def _refuse(kwargs: dict[str, Any], decoder: Any, plan: Plan) -> None:
    if plan.mlp_chunk is not None and wants(kwargs, decoder, "output_router_logits"):
        raise UnsupportedCallError("output_router_logits does not work with mlp_chunk, which calls each router often.")
    if wants(kwargs, decoder, "output_attentions"):
        raise UnsupportedCallError(
            "output_attentions=True needs the attention matrix of every layer, which is never built here; "
            "call inside handle.disabled()."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2):
        shape = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise UnsupportedCallError(
            f"attention_mask is {shape}; give a 2-D mask [batch, tokens] of ones with zeros on the left, or none."
        )
