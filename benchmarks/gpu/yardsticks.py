"""What the card can do: the rates that everything else is compared with.

Operands are random numbers, for a card draws less power and runs faster on numbers all alike, and arrays are far larger
than its L2 cache. Dense attention is timed with each backend of SDPA, because the default is not the fastest there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import timer_for
from benchmarks.gpu.worker import Case
from llm_accel.common.environment import hardware, versions

QUERY_HEADS, HEADS, DIM = 32, 8, 128  # Llama-3.1-8B
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def cases(device: str) -> dict[str, Case]:
    """By name; sizes for a card of 80 GB, or for a dry run."""
    large = device.startswith("cuda")
    size, copied, prompt, kept = (8192, 2**30, 32768, 131072) if large else (64, 2**16, 128, 256)
    found: dict[str, Case] = {
        "machine": partial(machine, device),
        "copy": partial(copy, device, copied),
        "matrix product": partial(product, device, size),
    }
    for name in BACKENDS if large else ("default",):
        found[f"prompt, SDPA {name}"] = partial(attention, device, name, prompt, prompt)
    for name in (*BACKENDS, "default") if large else ("default",):
        found[f"decode step, SDPA {name}"] = partial(attention, device, name, 1, kept)
    return found


NAMES = (
    "machine",
    "copy",
    "matrix product",
    "prompt, SDPA flash",
    "prompt, SDPA cudnn",
    "decode step, SDPA flash",
    "decode step, SDPA cudnn",
    "decode step, SDPA default",
)
DRY_NAMES = ("machine", "copy", "matrix product", "prompt, SDPA default", "decode step, SDPA default")


def machine(device: str) -> Iterator[dict[str, Any]]:
    """Versions and hardware."""
    yield {"versions": versions(), "hardware": hardware(torch.device(device))}


def copy(device: str, numbers: int) -> Iterator[dict[str, Any]]:
    """Bytes per second, read and written, of a copy of ``numbers`` bf16 numbers."""
    source = torch.randn(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    seconds = timer_for(device)(lambda: target.copy_(source))[0]
    yield {"bytes_per_second": 2 * source.nbytes / seconds, "median_us": 1e6 * seconds}


def product(device: str, size: int) -> Iterator[dict[str, Any]]:
    """FLOP per second of a product of square bf16 matrices."""
    left, right = torch.randn(2, size, size, dtype=torch.bfloat16, device=device).unbind(0)
    out = torch.empty_like(left)
    seconds = timer_for(device)(lambda: torch.matmul(left, right, out=out))[0]
    yield {"flop_per_second": 2 * size**3 / seconds, "median_us": 1e6 * seconds}


def attention(device: str, backend: str, queries: int, slots: int) -> Iterator[dict[str, Any]]:
    """Causal attention of a prompt, or of one query over all slots."""
    query = torch.randn(1, QUERY_HEADS, queries, DIM, dtype=torch.bfloat16, device=device)
    key, value = torch.randn(2, 1, HEADS, slots, DIM, dtype=torch.bfloat16, device=device).unbind(0)

    def run() -> object:
        return F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, enable_gqa=True)

    if backend == "default":
        seconds = timer_for(device)(run)[0]
    else:
        with sdpa_kernel(BACKENDS[backend]):
            seconds = timer_for(device)(run)[0]
    pairs = queries * slots - queries * (queries - 1) // 2
    flop, moved = 4 * pairs * DIM * QUERY_HEADS, 2 * DIM * 2 * (QUERY_HEADS * queries + HEADS * slots)
    rates = {"tflop_per_second": flop / seconds / 1e12, "gb_per_second": moved / seconds / 1e9}
    yield {"backend": backend, "queries": queries, "slots": slots, "median_us": 1e6 * seconds, **rates}
