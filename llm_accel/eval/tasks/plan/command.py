"""``llm-accel plan``: what a model takes with each method, before it is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from llm_accel.errors import ConfigError, LlmAccelError
from llm_accel.eval.lengths import length_label
from llm_accel.eval.runner import print_summary
from llm_accel.eval.table import NONE, aligned, size
from llm_accel.eval.tasks.plan.arithmetic import estimate
from llm_accel.eval.tasks.plan.model import Geometry, geometry, load_config
from llm_accel.eval.tasks.plan.settings import QUESTIONS, PlanSettings
from llm_accel.methods import Auto, Dense, MethodConfig
from llm_accel.patches.auto import chosen_methods
from llm_accel.patches.footprint import Load
from llm_accel.patches.install import make_plan
from llm_accel.patches.plan import ForImages
from llm_accel.registry import parse_all

_EXPLAINED = """\
estimates, from shapes and formulas alone; nothing was loaded or timed
held: keys, values and states of the batch after the answer; paged methods (adakv): at most
step: (weights read + keys and values read) / bandwidth, of the last step; kernels reach part of it
prefill peak: weights, activations, and the cache while all prompts are read in one call
batch: rows that fit, their prompts read at once / one by one (handle.prefill)
break-even: shortest prompt on which an answer reads fewer bytes of keys and values than dense, choosing included"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the settings."""
    PlanSettings.add_arguments(parser)
    parser.add_argument("--json-only", action="store_true", help="print only the JSON line, no table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table and one JSON line, and returns that.

    Raises:
        LlmAccelError: no such model or method, or one that cannot be planned.
    """
    settings = PlanSettings.from_arguments(args)
    result = figures(settings)
    print_summary(result, None if args.json_only else render(result))
    return result


def figures(settings: PlanSettings) -> dict[str, Any]:
    """The whole result as plain data."""
    shape = geometry(load_config(settings.model), settings.dtype)
    name, bandwidth = settings.rate
    return {
        "command": "plan",
        "settings": settings.to_dict(),
        "bandwidth": {"name": name, "bytes_per_s": bandwidth},
        "model": {
            "parameters": sum(p.numel() for p in shape.model.parameters()),
            "dtype": str(shape.model.dtype).removeprefix("torch."),
            "weight_bytes": shape.weight_bytes,
            "step_weight_bytes": shape.step_bytes(settings.batch),
            "kv_bytes_per_token": sum(shape.entry_bytes.values()),
            "full_layers": len(shape.wiring.entries) - len(shape.windows.keys() & shape.wiring.entries.keys()),
            "sliding_layers": len(shape.windows),
            "state_bytes": shape.state_bytes,
            "activation_bytes_per_token": shape.token_bytes,
            "longest": getattr(shape.model.config.get_text_config(), "max_position_embeddings", None),
        },
        "methods": {spec: _method(shape, spec, settings) for spec in settings.methods},
    }


def _method(shape: Geometry, spec: str, settings: PlanSettings) -> dict[str, Any]:
    """Figures of one method, or why `apply` would refuse it."""
    given = parse_all(spec) or (Dense(),)
    if any(isinstance(config, ForImages) for config in given):
        raise ConfigError(
            f"--method {spec!r} acts on visual tokens, whose number a prompt's images decide; leave it out, and give "
            "the tokens that stay as --context."
        )
    try:
        configs, chosen = chosen_methods(shape.model, [_told(config, shape, settings) for config in given])
        plan = make_plan(shape.model, configs, trace=False, strict=False)
    except LlmAccelError as error:
        return {"refused": str(error)}
    load = Load(settings.context, settings.new_tokens)
    found = estimate(shape, plan, load, settings.batch, settings.memory, settings.rate[1]).to_dict()
    later = settings.question == "later" and any(config.info.needs_query for config in configs)
    return found | {"chosen": chosen, "needs_query": later}


def _told(config: MethodConfig, shape: Geometry, settings: PlanSettings) -> MethodConfig:
    """``auto`` without options knows what the plan is made for; every other method is what it is."""
    if config != Auto():
        return config
    left = 0.0 if settings.memory is None else 0.9 * (settings.memory - shape.weight_bytes) / 2**30
    return Auto(
        question=QUESTIONS[settings.question],
        context=settings.context,
        rows=settings.batch,
        memory=left if left > 0 else None,
    )


def render(result: dict[str, Any]) -> str:
    """The result as text."""
    settings, model = result["settings"], result["model"]
    rate, memory = result["bandwidth"], settings["memory"]
    lines = [
        f"plan: {settings['model'] or 'bundled needle model'}, {model['dtype']}, prompt "
        f"{length_label(settings['context'])}, batch {settings['batch']}, {settings['new_tokens']} new tokens, "
        f"{'no memory limit' if memory is None else size(memory)}, {rate['name']} "
        f"({rate['bytes_per_s'] / 1e9:.0f} GB/s)",
        f"weights {size(model['weight_bytes'])} ({model['parameters'] / 1e9:.2f} billion), of which a step reads "
        f"{size(model['step_weight_bytes'])}",
        f"cache per token {size(model['kv_bytes_per_token'])}: {model['full_layers']} full layers, "
        f"{model['sliding_layers']} sliding windows, linear-attention states {size(model['state_bytes'])} per row",
    ]
    if model["longest"] is not None and model["longest"] < settings["context"]:
        lines.append(f"warning: the model was made for {model['longest']} tokens")
    methods = result["methods"]
    dense = methods["dense"].get("kv_bytes")
    header = ["", "held", "of dense", "prefill peak", "batch", "step ms", "break-even"]
    rows = [_row(name, entry, dense) for name, entry in methods.items() if "refused" not in entry]
    lines += ["", *aligned([header, *rows]), ""]
    lines += [f"{name}: {entry['refused']}" for name, entry in methods.items() if "refused" in entry]
    for name, entry in methods.items():
        lines += [f"{name}: {entry['chosen']}"] if entry.get("chosen") else []
        lines += [f"{name}: chooses by the question, which comes later here"] if entry.get("needs_query") else []
    return "\n".join([*lines, _EXPLAINED])


def _row(name: str, entry: dict[str, Any], dense: int | None) -> list[str]:
    rows, even = entry["largest_batch"], entry["break_even"]
    return [
        name,
        size(entry["kv_bytes"]),
        NONE if not dense else f"{entry['kv_bytes'] / dense:.1%}",
        size(entry["prefill_peak"]),
        NONE if rows is None else f"{rows['at_once']} / {rows['one_by_one']}",
        f"{entry['step_ms']:.2f}",
        NONE if even is None or name == "dense" else str(even),
    ]
