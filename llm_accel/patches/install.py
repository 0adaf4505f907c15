"""Puts a plan on one model instance and takes it off again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llm_accel.errors import AlreadyAppliedError, ConfigError, UnsupportedModelError
from llm_accel.kernels import column_votes, ragged_decode
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods import AttentionMethod, MethodConfig, PromptCompression, ScoreAndKeep, StepEviction, VASparse
from llm_accel.patches.acceptance import check_derived, check_positions, check_readers, decoder_of, skipped_layers
from llm_accel.patches.attention import PREFIX, accel_name, register
from llm_accel.patches.base_attention import SUPPORTED, stores_latents
from llm_accel.patches.compiled.call import arm, disarm
from llm_accel.patches.compiled.eligible import COMPILED, why_eager
from llm_accel.patches.generate import SHADOWED, GenerateProxy, RefusingProxy
from llm_accel.patches.heads import plan_heads
from llm_accel.patches.hook import DecoderExit, DecoderHook
from llm_accel.patches.lead import lead_of
from llm_accel.patches.mlp_chunks import arm_mlps, check_mlps, disarm_mlps
from llm_accel.patches.plan import Decode, Plan, check_composition
from llm_accel.patches.ranks import head_shard, notes
from llm_accel.patches.vision.install import drop_hooks, install_vision, plan_visual, uninstall_vision
from llm_accel.patches.wiring import wiring_of


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile(model)``, which is a wrapper that holds it; any other model itself."""
    return getattr(model, "_orig_mod", model)


def hook_of(model: Any) -> DecoderHook | None:
    """The plug-in's hook on this model, if there is one."""
    if not isinstance(model, PreTrainedModel):
        return None
    hooks = model.get_decoder()._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, DecoderHook)), None)


def make_plan(
    model: Any,
    configs: Sequence[MethodConfig],
    trace: bool,
    strict: bool,
    decode: Decode = "eager",
    mlp_chunk: int | None = None,
) -> Plan:
    """Checks model and methods against each other, touching nothing; raises what ``apply`` documents."""
    check_composition(configs)
    decoder = decoder_of(model)
    hook = hook_of(model)
    if hook is not None:
        raise AlreadyAppliedError(
            f"{type(model).__name__} already runs {hook.plan.title}; call llm_accel.remove(model) first, "
            "or give several methods as one list."
        )
    base = decoder.config._attn_implementation.removeprefix(PREFIX)
    base = next((name for name in SUPPORTED if accel_name(name) == PREFIX + base), base)
    if base not in SUPPORTED:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs attn_implementation={base!r}; supported: {', '.join(SUPPORTED)}. "
            "Load it with one of them or call model.set_attn_implementation(...)."
        )
    wiring = wiring_of(decoder)
    skipped = skipped_layers(decoder, wiring, configs, strict)
    visual = plan_visual(model, configs, skipped, trace)  # what it refuses is more telling than what follows from it
    if wiring.problem is not None:
        raise UnsupportedModelError(f"{decoder.config.model_type} cannot be accelerated: {wiring.problem}.")
    check_positions(decoder, wiring, configs, skipped)
    check_mlps(decoder, mlp_chunk)
    layers = int(decoder.config.num_hidden_layers)
    backends = {"attention": (base, "the model's own implementation")}
    if mlp_chunk is not None:
        backends["mlp"] = (f"{mlp_chunk} tokens at a time", "mlp_chunk")
    if any(isinstance(config, ScoreAndKeep) and config.observed_queries for config in configs):
        backends["scores"] = column_votes.OP.explain(attention_problem(decoder))
    if any(isinstance(config, ScoreAndKeep) and config.page_size for config in configs):
        backends["decode"] = ragged_decode.OP.explain(attention_problem(decoder))
    for config in configs:
        if isinstance(config, AttentionMethod | VASparse | StepEviction | PromptCompression):
            backends |= config.backends(attention_problem(decoder))
    shard = head_shard(model)
    heads = plan_heads(model, configs, skipped, shard)
    check_readers(decoder, wiring, configs, splits=heads.get("split") is not None)
    check_derived(decoder, wiring, configs, splits=heads.get("split") is not None)
    lead, said = lead_of(model, configs)
    backends |= said | heads.pop("backends", {}) | visual.pop("backends", {}) | notes(model, shard)
    plan = Plan(
        tuple(configs),
        layers,
        base,
        skipped,
        trace,
        backends,
        heads=shard,
        mlp_chunk=mlp_chunk,
        readers=wiring.readers,
        derived=frozenset(wiring.derived),
        lead=lead,
        **heads,
        **visual,
    )
    return plan if decode == "eager" else _compiled(plan, decoder, decode)


def _compiled(plan: Plan, decoder: Any, decode: Decode) -> Plan:
    """The plan with its decode steps compiled where that can be; with "compiled" it must."""
    if decode not in ("compiled", "auto"):
        raise ConfigError(f"decode={decode!r} is not allowed; give 'eager', 'compiled' or 'auto'.")
    problem = attention_problem(decoder)
    reason = why_eager(plan, decoder, problem)
    if reason is not None and decode == "compiled":
        raise ConfigError(f"decode='compiled' does not work for {plan.title}: {reason}. Use 'auto' or 'eager'.")
    if reason is None and decode == "auto" and problem.device.type != "cuda":
        reason = "auto compiles on GPUs only"
    said = ("compiled", COMPILED) if reason is None else ("eager", reason)
    return replace(plan, decode=decode, compiles=reason is None, backends={**plan.backends, "decode steps": said})


def attention_problem(decoder: Any) -> Problem:
    """What attention of this model asks of an operation."""
    config = decoder.config
    device = next((p.device for p in decoder.parameters() if p.device.type != "meta"), torch.device("cpu"))
    heads = int(config.num_attention_heads)
    if stores_latents(decoder):  # they are expanded to all query heads before attention
        return Problem(device, decoder.dtype, int(config.qk_head_dim))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Problem(device, decoder.dtype, int(head_dim), heads // int(getattr(config, "num_key_value_heads", heads)))


def install(model: Any, plan: Plan) -> DecoderHook:
    """Hooks the decoder, names our attention in its configuration, shadows ``generate``. What has been done by then is
    undone where anything fails."""
    hook = DecoderHook(plan)
    try:
        _put_on(model, hook)
    except BaseException:
        _take_off(model, hook)
        raise
    return hook


def _put_on(model: Any, hook: DecoderHook) -> None:
    decoder, plan = model.get_decoder(), hook.plan
    name = register(plan.base)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    decoder.register_forward_hook(DecoderExit(), with_kwargs=True)
    decoder.config._attn_implementation_internal = name
    arm(decoder, hook)
    arm_mlps(decoder, hook)
    if hasattr(model, "generate"):
        model.generate = GenerateProxy(model, hook)
        for entry in SHADOWED:
            if hasattr(model, entry):
                setattr(model, entry, RefusingProxy(entry))
    if plan.family is not None:
        install_vision(model, hook)


def suspend(model: Any, hook: DecoderHook) -> Callable[[], None]:
    """Takes a plug-in off a model for a while. Call the result to put it on again as it was, its compiled graphs
    included, once no other is there."""
    decoder = model.get_decoder()
    call = decoder._compiled_call_impl
    _take_off(model, hook)

    def resume() -> None:
        hook.enabled = True
        if call is not None:
            decoder._compiled_call_impl = call
        _put_on(model, hook)

    return resume


def uninstall(model: Any) -> None:
    """Exact undo; a no-op on a model without a plug-in."""
    hook = hook_of(model)
    if hook is not None:
        _take_off(model, hook)
    else:
        _drop_proxies(model)


def _take_off(model: Any, hook: DecoderHook) -> None:
    """Undoes all that :func:`install` does, or as much of it as has been done."""
    _unhook(model.get_decoder(), hook)
    uninstall_vision(model, hook.plan)
    _drop_proxies(model)


def _drop_proxies(model: Any) -> None:
    for entry in ("generate", *SHADOWED):
        if isinstance(getattr(model, "__dict__", {}).get(entry), GenerateProxy | RefusingProxy):
            delattr(model, entry)


def _unhook(decoder: Any, hook: DecoderHook) -> None:
    hook.enabled = False  # for the generate proxy of an outer model, when the plug-in is taken off its decoder alone
    disarm(decoder)
    disarm_mlps(decoder)
    drop_hooks(decoder, DecoderHook, DecoderExit)
    if decoder.config._attn_implementation == accel_name(hook.plan.base):
        decoder.config._attn_implementation_internal = hook.plan.base
