"""What the benchmarks share: the mid-size model, its prompts, and the conditions that stand beside every figure.

Run as a script it does one prefill in a process of its own, so that its peak resident memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

import llm_accel
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.layers import AccelLayer
from llm_accel.registry import parse

MIB = 2**20
KV_HEADS, HEAD_DIM = 2, 64
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 4  # one token in one layer, keys and values in fp32


def build_model(layers: int) -> PreTrainedModel:
    """Random-weight Llama in fp32: hidden 512, 8 query heads and 2 KV heads of 64, vocabulary 8192."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=131072,
    )
    return LlamaForCausalLM(config).eval()


def make_prompt(length: int) -> torch.Tensor:
    """Random token ids [1, length]."""
    return torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None) -> None:
    """One pass over the prompt; only the last row of logits is computed."""
    model(ids, **{CACHE: cache}, use_cache=cache is not None, logits_to_keep=1)


def storage_bytes(cache: DynamicCache) -> int:
    """Bytes of the storage behind keys and values of all layers, views included."""
    held = 0
    for layer in cache.layers:
        if isinstance(layer, AccelLayer):
            held += layer.nbytes()
        else:
            held += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    return held


def conditions() -> dict[str, Any]:
    """Hardware, versions and model: what belongs beside every figure."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llm_accel": llm_accel.__version__,
        "dtype": "float32",
        "model": "random-weight Llama, hidden 512, 8 query / 2 KV heads, head_dim 64",
    }


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Prints the result as one JSON object and writes it where asked."""
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def prefill_peak(mode: str, length: int, layers: int) -> dict[str, float]:
    """:func:`measure_prefill` in a process of its own."""
    command = [sys.executable, __file__, mode, str(length), str(layers)]
    measured: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return measured


def measure_prefill(mode: str, length: int, layers: int) -> dict[str, float]:
    """Peak resident memory of one prefill above the loaded model, in MiB, its time in seconds and the bytes it keeps.
    ``mode``: a method, ``dense``, or ``activations``, which is the prompt without a cache."""
    model, ids = build_model(layers), make_prompt(length)
    prefill(model, make_prompt(64), None)
    if mode not in ("activations", "dense"):
        llm_accel.apply(model, parse(mode))
    cache = None if mode == "activations" else DynamicCache(config=model.config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    prefill(model, ids, cache)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_mib": peak / 1024, "seconds": seconds, "kv_bytes": 0 if cache is None else storage_bytes(cache)}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("mode")
    arguments.add_argument("length", type=int)
    arguments.add_argument("layers", type=int)
    print(json.dumps(measure_prefill(**vars(arguments.parse_args()))))
