"""Host time of a compiled decode step with the graph stubbed out: what Python does while a GPU could be working.

    python -m benchmarks.compiled_host --out benchmarks/results/compiled_host_cpu.json

A model of 32 layers and next to no width decodes with a stub in place of the graph, which gives the same output at
once. Two figures per method: of a call of the model, and of a step of ``generate``, as the difference of a long and a
short answer. ``transformers`` is the model without the plug-in, whose decoder is the stub: what a call and a step take
anyhow. ``ours`` is what the plug-in adds to them. All by turns, medians of ``--rounds``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import llm_accel
from benchmarks.common import conditions, publish
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.compiled import call
from llm_accel.registry import parse

LAYERS, WIDTH, PROMPT, WARM = 32, 64, 96, 8
METHODS = ("dense", "snapkv:budget=64", "h2o:budget=64", "streaming_llm:budget=64", "adakv:budget=64")
PLAIN = "transformers"


def model_of(method: str) -> PreTrainedModel:
    """A model of 32 layers, decoding compiled with ``method``, or plain."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    if method != PLAIN:
        llm_accel.apply(model, method if method == "dense" else parse(method), decode="compiled")
    return model


def stubbed(model: Any) -> ExitStack:
    """Inside, what a decode step computes is there at once: the result of the graph, or of the plain decoder."""
    hidden = torch.randn(1, 1, WIDTH)

    def step(forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=given[CACHE])

    decoder, stack = model.get_decoder(), ExitStack()
    if decoder._compiled_call_impl is not None:
        stack.enter_context(mock.patch.object(call.DecodeCall, "_compiled", lambda *_: step))
        return stack
    whole = decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache, inputs = kwargs.get(CACHE), kwargs.get("input_ids")
        if inputs is None or inputs.shape[1] > 1:
            return whole(*args, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    stack.enter_context(mock.patch.object(decoder, "forward", forward))
    return stack


def call_seconds(model: Any, steps: int) -> float:
    """Of one call of the model in a loop, with a cache."""
    handle = getattr(getattr(model, "generate", None), "hook", None)
    cache: Any = DynamicCache(config=model.config) if handle is None else llm_accel.Handle(model, handle).new_cache()
    token = torch.zeros(1, 1, dtype=torch.long)
    model(torch.ones(1, PROMPT, dtype=torch.long), **{CACHE: cache})
    session = getattr(cache, "llm_accel", None)
    if session is not None:
        session.headroom = steps + WARM
    for _ in range(WARM):
        model(token, **{CACHE: cache})
    begin = time.perf_counter()
    for _ in range(steps):
        model(token, **{CACHE: cache})
    return (time.perf_counter() - begin) / steps


def step_seconds(model: Any, steps: int) -> float:
    """Of one step of ``generate``: a long answer less a short one."""
    prompt, spent = torch.ones(1, PROMPT, dtype=torch.long), []
    for new in (WARM, WARM + steps):
        begin = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        spent.append(time.perf_counter() - begin)
    return (spent[1] - spent[0]) / steps


def measure(steps: int, rounds: int, methods: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds by method."""
    models = {method: model_of(method) for method in (PLAIN, *methods)}
    times: dict[str, dict[str, list[float]]] = {name: {"call": [], "generate step": []} for name in models}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in models.items():
                with stubbed(model):
                    times[name]["call"].append(1e3 * call_seconds(model, steps))
                    times[name]["generate step"].append(1e3 * step_seconds(model, steps))
    medians = {name: {kind: statistics.median(spent) for kind, spent in kinds.items()} for name, kinds in times.items()}
    plain = medians[PLAIN]
    for name, found in medians.items():
        if name != PLAIN:
            found |= {f"{kind}, ours": found[kind] - plain[kind] for kind in plain}
    return {name: {kind: round(value, 4) for kind, value in found.items()} for name, found in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.steps, args.rounds, tuple(args.methods))
    publish({"conditions": conditions(), "layers": LAYERS, "milliseconds": found}, args.out)


if __name__ == "__main__":
    main()
