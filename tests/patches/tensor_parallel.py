"""What one process answers in many cases, and a script for torchrun whose processes, sharing the weights of the same
models, must answer the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import llm_accel
from llm_accel import ConfigError, Handle
from llm_accel.methods import HeadProfile
from llm_accel.patches.identity import weight_hash
from tests.patches.calls import IDS, MASK, logits_of
from tests.tiny import ATTENTION, prompt, tiny_model
from tests.tiny_vlm import UNEQUAL, decode, inputs, tiny_vlm

CLOSE = 2e-5
TOKENS = 7
MANY = {"num_attention_heads": 8, "num_key_value_heads": 4}  # two KV heads for each process; without it, one
TEXT: dict[str, dict[str, int]] = {"llama": {}, "qwen3": MANY, "gemma3": MANY, "gpt_oss": {}}
ADAKV: dict[str, Any] = {"budget": 24, "window": 8, "page": 8}
HEADS: dict[str, Any] = {"full": 0.5, "sinks": 4, "recent": 12}
HIP: dict[str, Any] = {
    "sink": 8,
    "window": 8,
    "budget": 16,
    "budget_edge": 16,
    "block_q": 16,
    "stages": ((16, None, 1), (8, 32, 1)),
    "refresh": (2, 1),
    "min_prefill_len": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 24, "window": 8},
    "h2o": {"budget": 24},
    "adakv": ADAKV,
    "retrieval_heads": HEADS,
    "hip": HIP,
}
OTHERS: dict[str, dict[str, Any]] = {
    "hip, all heads alike": HIP | {"share_heads": "all"},
    "adakv, again and again": ADAKV | {"rule": "blend", "recompress_every": 3},
    "retrieval_heads, masked": {"mode": "mask", "head_list": ("0.0", "1.3", "1.6", "2.5", "2.7")},
    "random": {"budget": 24, "window": 8},
    "pyramidkv": {"budget": 24, "window": 8, "beta": 2},
}
VASPARSE: dict[str, Any] = {"beta": 0.3, "lam": 400.0, "keep": 0.5, "prune_every": 3, "protect_last": 1}
VISUAL: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "budget": 5},
    "flowcut": {"budget": 3, "llm_stage": "on"},
    "vasparse": VASPARSE | {"merge": 2},
    "vasparse, mean": VASPARSE | {"saliency_head": "mean"},
}
WHOLE_ATTENTION = {"adakv": ADAKV, "retrieval_heads": HEADS}  # the plan of this family does not share it out
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": METHODS,
    "qwen3": METHODS | OTHERS,
    "gemma3": METHODS,
    "gpt_oss": WHOLE_ATTENTION,
    "llava": VISUAL,
}


def applied(model: PreTrainedModel, folder: Path, case: str, options: dict[str, Any]) -> Handle:
    name = case.partition(",")[0]
    if "full" in options:
        options = options | {"heads": str(folder / "heads.json")}
    return llm_accel.apply(model, name, **options)


def answer(model: PreTrainedModel) -> torch.Tensor:
    """Logits [B, tokens, vocabulary] of greedy decoding."""
    if model.config.model_type == "llava":
        return decode(model, inputs(model, UNEQUAL), max_new_tokens=TOKENS)[1]
    return logits_of(model, IDS, MASK, max_new_tokens=TOKENS)


def prepare(folder: Path) -> None:
    """Writes checkpoints, head profiles, and what one process answers."""
    expected: dict[tuple[str, str], Any] = {}
    for family, methods in CASES.items():
        own = folder / family
        model = tiny_model(family, **TEXT[family]) if family in TEXT else tiny_vlm(family)
        model.save_pretrained(own)
        if family in TEXT:
            write_profile(model, own / "heads.json")
        expected[family, "weights"] = weight_hash(model)
        for case, options in methods.items():
            with applied(model, own, case, options):
                expected[family, case] = answer(model)
    torch.save(expected, folder / "expected.pt")


def write_profile(model: PreTrainedModel, path: Path) -> None:
    """Scores by which neighbouring heads differ, and so do processes."""
    config, generator = model.get_decoder().config, torch.Generator().manual_seed(3)
    tables = [
        tuple(map(tuple, torch.rand(config.num_hidden_layers, heads, generator=generator).tolist()))
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    ]
    HeadProfile("tiny", "gates", *tables).save(path)


def check(folder: Path) -> Iterator[str]:
    """Every case in one of the processes; raises where it differs."""
    expected = torch.load(folder / "expected.pt")
    for family, methods in CASES.items():
        kind = AutoModelForCausalLM if family in TEXT else AutoModelForImageTextToText
        attention = ATTENTION.get(family, "sdpa")
        model = kind.from_pretrained(folder / family, tp_plan="auto", attn_implementation=attention).eval()
        if family == "llava":
            model.generation_config = tiny_vlm(family).generation_config
        dense = answer(model)
        assert weight_hash(model) == expected[family, "weights"], family
        for case, options in methods.items():
            with applied(model, folder / family, case, options) as handle:
                logits, wanted = answer(model), expected[family, case]
                said = handle.report().backends["tensor parallel"]
            assert torch.equal(logits.argmax(-1), wanted.argmax(-1)), (family, case)
            difference = float((logits - wanted).abs().max())
            assert difference <= CLOSE, (family, case, difference)
            assert said[0] == f"rank {dist.get_rank()} of 2"
            yield f"{family}: {case} {difference:.1e}, {said[1].partition(';')[0]}"
        assert torch.equal(answer(model), dense), family
        if family == "qwen3":
            caches(model, folder)


def caches(model: PreTrainedModel, folder: Path) -> None:
    """Each process saves its heads and goes on with them; what was not meant for it is refused."""
    with applied(model, folder / "qwen3", "adakv", ADAKV) as handle:
        cache = handle.new_cache()
        model.generate(prompt(60), past_key_values=cache, max_new_tokens=1, do_sample=False)
        handle.save_cache(cache, folder / "chat.safetensors")
        loaded = handle.load_cache(folder / "chat.safetensors")
        assert (folder / f"chat.rank{dist.get_rank()}of2.safetensors").is_file()
        more = torch.cat([prompt(60), prompt(9, seed=5)], dim=1)
        went_on, read = (logits_of(model, more, None, past_key_values=one) for one in (cache, loaded))
        assert torch.equal(went_on, read)
        with pytest.raises(ConfigError, match="cannot be read"):
            handle.load_cache(folder / "another.safetensors")
    with pytest.raises(ConfigError, match="processes share the weights"):
        llm_accel.apply(model, "snapkv", budget=24, window=8, decode="compiled")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo")
    for line in check(Path(sys.argv[1])):
        print(f"rank {dist.get_rank()} agrees on {line}", flush=True)
    dist.barrier()  # nobody takes the group down while others use it
    dist.destroy_process_group()
