"""One prefill for several methods that evict at the end of a prompt, which until then is the dense model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_accel.cache import AccelLayer
from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import StepEviction
from llm_accel.patches.attention import over_entries
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.hook import DecoderHook, attach_session, end_call
from llm_accel.patches.plan import Plan
from llm_accel.patches.prefill import Prompts, padded, refuse, why_whole
from llm_accel.patches.recording import Recording
from llm_accel.patches.replay import ReadCache
from llm_accel.patches.rows import join_layer


def record(model: Any, hook: DecoderHook, prompts: Prompts, mask: Tensor | None) -> Recording:
    """See :meth:`llm_accel.Handle.record`."""
    refuse(model, hook, "record", why_own(hook.plan, model.get_decoder().config))
    ids, mask = padded(prompts, mask, model.get_input_embeddings().weight.device, "record")
    recording = Recording(ids, mask, model.get_decoder())
    once = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    type(model).generate(model, ids, attention_mask=mask, **{CACHE: recording}, **once)
    return recording


def resume(model: Any, hook: DecoderHook, recording: Recording) -> ReadCache:
    """See :meth:`llm_accel.Handle.resume`."""
    decoder = model.get_decoder()
    refuse(model, hook, "resume", why_own(hook.plan, decoder.config))
    if recording.outcome is None or recording.decoder is not decoder:
        raise UnsupportedCallError("resume: this recording is not of this model; give one from handle.record.")
    cache = ReadCache(recording.ids, recording.mask)
    session = attach_session(cache, hook.plan, decoder.config)
    session.begin(recording.ids.shape[1], 0, recording.mask)
    if session.context is not None:
        session.context = recording.context
    for index, layer in enumerate(cache.layers):
        stock: Any = recording.layers[index]
        if isinstance(layer, AccelLayer):
            key, value = layer.update(stock.keys.clone(), stock.values.clone())
            over_entries(layer, recording.attentions[index], recording.queries[index], key, value, session, index)
        else:
            join_layer(hook.plan, layer, [stock], recording.ids.shape[1], lambda *_: None)
    end_call(session, decoder)
    cache.outcome = recording.outcome.clone()
    hook.settle(session)
    return cache


def why_own(plan: Plan, config: Any) -> str | None:
    """Why a prompt must be read for this method alone, or None."""
    if plan.split is not None or plan.mask is not None:
        return "its heads read the prompt in a way of their own"
    if plan.readers or plan.derived:
        return "layers of this model read entries of other layers, or what is computed from theirs"
    if isinstance(plan.kv_method, StepEviction) and plan.kv_method.relative_positions:
        return "it stores keys without their positions"
    return why_whole(plan, config)
