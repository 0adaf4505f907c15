"""Our attention and mask functions, registered once per base implementation under a neutral name."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.cache import AccelLayer, GeneratedLayer, GroupedLayer, MarkedLayer
from llm_accel.cache.layer import CallStage
from llm_accel.errors import UnsupportedCallError, UnsupportedModelError
from llm_accel.methods import ContextCompression
from llm_accel.patches.base_attention import ModelAttention, base_function
from llm_accel.patches.compiled.cache import GraphCache
from llm_accel.patches.context import Rereading
from llm_accel.patches.contrast import ContrastStep
from llm_accel.patches.eviction import Eviction
from llm_accel.patches.head_groups import GroupedAttention
from llm_accel.patches.head_mask import attend_window, attend_without, masked_rows
from llm_accel.patches.phase import Phase
from llm_accel.patches.ranks import check_heads
from llm_accel.patches.recording import Recording
from llm_accel.patches.replay import Replay
from llm_accel.patches.session import Session
from llm_accel.patches.vision.cuts import record_scores
from llm_accel.patches.vision.head_scaling import BlindPass, scale_heads
from llm_accel.patches.vision.weight_shift import ShiftedAttention, mark_entries

PREFIX = "llm_accel_"
_NEUTRAL = {"flash_attention_2": "fa2", "flash_attention_3": "fa3"}


def accel_name(base: str) -> str:
    """The name under which a base implementation is wrapped; transformers reads meaning into "flash" in a name."""
    return PREFIX + _NEUTRAL.get(base, base)


def register(base: str) -> str:
    """Registers attention and mask function for one base implementation; returns their common name."""
    name = accel_name(base)
    AttentionInterface.register(name, AccelAttention(base))
    AttentionMaskInterface.register(name, AccelMask(base))
    return name


class AccelAttention:
    """Attention of one layer: dense through the base implementation, eviction before or after it."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.__name__ = accel_name(base)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        llm_accel: Session | GraphCache | Replay | Rereading | Recording | BlindPass | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, Hq, T, D], key and value [B, H, P, D] post-RoPE -> [B, T, Hq, Dv]."""
        model = ModelAttention(self.base, module, kwargs)
        if isinstance(llm_accel, GraphCache | Replay):
            index: Any = getattr(module, "layer_idx", None)
            return llm_accel.attend(index, model, query, key, value), None
        if isinstance(llm_accel, Rereading | Recording | BlindPass):
            return llm_accel.attend(model, query, key, value, attention_mask), None
        if llm_accel is None:
            return base_function(module, self.base)(module, query, key, value, attention_mask, **kwargs)
        check_heads(llm_accel.plan.heads, query)
        index, layer = llm_accel.entries_for(module, key, value, attention_mask)

        def attention(query: Tensor) -> Tensor:
            if index is None or layer is None:
                return model.plain(query, key, value, attention_mask)
            return over_entries(layer, model, query, key, value, llm_accel, index)

        mask = llm_accel.plan.mask
        heads = mask.heads[index] if mask is not None and index is not None else ()
        rows = masked_rows(mask, llm_accel, query.shape[2]) if mask is not None and heads else 0
        if mask is None or rows == 0:
            output = attention(query)
            return (output if index is None or layer is None else scale_heads(llm_accel, index, layer, output)), None
        if mask.mode != "window":
            return attend_without(mask, heads, rows, query, attention), None
        output = attention(query)
        if layer is not None:  # other layers have windows of their own
            output = attend_window(mask, heads, rows, model, (query, key, value), layer, output)
        return output, None


class AccelMask:
    """Builds no mask for our layers (their sentinel length is 0) and the base mask for everything else."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments as the mask functions of transformers."""
        length = kwargs.get("kv_length")
        if not (isinstance(length, int) and length == 0):
            return ALL_MASK_ATTENTION_FUNCTIONS[self.base](*args, **kwargs)
        if kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip", True):
            raise UnsupportedCallError(
                "this call adds something to the causal mask (packed sequences, bidirectional image blocks); "
                "KV compression works with plain causal masks only."
            )
        return None


def over_entries(
    layer: AccelLayer,
    attention: ModelAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    session: Session,
    index: int,
) -> Tensor:
    """Attention over the entries of a layer of ours, [B, T, Hq, Dv]: of the layer itself or of a later one."""
    if layer.stage is not CallStage.ARRIVED:
        return _again(layer, attention, query, index)
    layer.stage = CallStage.IDLE
    readers = session.plan.reader_count(index)
    if not readers:
        layer.given = None  # nobody else looks for these entries, which must not be held past their eviction
    if session.padding is not None:
        layer.pad(session.padding.to(key.device), query.shape[2])
    split = session.plan.split
    if split is not None and isinstance(layer, GroupedLayer):
        return GroupedAttention(session, split, layer, index, attention)(query, key, value)
    key = layer.turned_keys(session.rotary, key, session.arrived_at)
    record_scores(session, index, (query, key, value), layer.start, attention)
    if isinstance(layer, MarkedLayer):
        mark_entries(session, layer)
        attention = ShiftedAttention(attention, session, layer)
    decoding = session.plan.decoding
    if decoding is not None and isinstance(layer, GeneratedLayer):
        return ContrastStep(session, decoding, layer, attention).attend(query, key, value)
    kv_method = session.plan.kv_method if index not in session.plan.skipped else None
    if kv_method is None or isinstance(kv_method, ContextCompression):  # such a method evicts after the call
        output = layer.attend(attention, query, key, value)
        layer.after_readers(readers, key, value, layer.own_storage if session.phase is Phase.PREFILL_END else None)
        return output
    eviction = Eviction(session, kv_method, layer, index, attention)
    if session.phase is Phase.DEFERRED_EVICTION:
        key, value = eviction.before_attention(query, key, value)
    fused = eviction.attended(query, key, value)
    if fused is not None:
        layer.after_readers(readers, key, value, None)
        return fused
    output, lse = eviction.attend(query, key, value)
    layer.after_readers(readers, key, value, partial(eviction.after_attention, query, key, lse))
    return output


def _again(layer: AccelLayer, attention: ModelAttention, query: Tensor, index: int) -> Tensor:
    """Attention of a later layer's queries over the entries of ``layer``, of which nothing is evicted before."""
    reading = layer.reading
    if reading is None:
        raise UnsupportedModelError(
            f"{type(attention.module).__name__} attends more than once to the same keys in layer {index}, where "
            "entries may have been evicted in between. Remove the plug-in and report the model class."
        )
    output = layer.attend_again(attention, query, reading.key, reading.value)
    layer.read_once()
    return output
