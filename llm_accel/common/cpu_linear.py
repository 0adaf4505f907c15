"""Linear layers in fp32 on a CPU, by the faster of the two libraries that torch brings: its BLAS or oneDNN.

torch takes BLAS, which is MKL on x86, and MKL leaves half of the vector units of other makers' processors unused: on an
AMD EPYC core with AVX-512 110 GFLOP/s, where oneDNN reaches 250. Both compute in fp32; they differ in the order of
additions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# oneDNN's call costs 10 us more, which small products do not win back: multiplications of a call, or weights of a layer
_LEAST_PRODUCT, _LEAST_WEIGHTS = 2**20, 2**17
_BLOCKS = (256, 128, 64, 32)  # rows that are multiplied at a time
_WORTH = 1.2  # times as fast, for it to be taken
_ROWS, _SIDE, _TRIES = 256, 768, 5  # of the product that is timed


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` without gradients, by oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """``input``: fp32 [..., in_features]. fp32 [..., out_features]."""
        small = self.weight.numel() < _LEAST_WEIGHTS and input.numel() * self.out_features < _LEAST_PRODUCT
        if small or torch.compiler.is_compiling():  # a compiler chooses for itself
            return super().forward(input)
        return product(input, self.weight, self.bias)


def use_faster_linear(model: nn.Module) -> int:
    """Turns the fp32 linear layers of a model for inference to oneDNN where that is faster here; how many."""
    found = [layer for layer in model.modules() if _fits(layer)]
    if not found or not onednn_is_faster():
        return 0
    for layer in found:
        layer.__class__ = OneDnnLinear
    return len(found)


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear:  # others have reasons to be so
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than BLAS on this machine, by a trial of a few milliseconds."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, weight = torch.ones(_ROWS, _SIDE), torch.ones(_SIDE, _SIDE)
    return _seconds(lambda: linear(rows, weight)) > _WORTH * _seconds(lambda: product(rows, weight))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` of fp32 [..., in], [out, in] and [out], by oneDNN.

    In blocks of few sizes: for each size of a product oneDNN keeps code and buffers of up to a megabyte, a thousand of
    them, and prompts have every length.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    blocks = list(_blocks(len(flat)))
    if len(blocks) == 1:
        return _product(rows, weight, bias)
    result = rows.new_empty(*rows.shape[:-1], len(weight))
    for part, out in zip(flat.split(blocks), result.view(-1, len(weight)).split(blocks), strict=True):
        out.copy_(_product(part, weight, bias))
    return result


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _blocks(rows: int) -> Iterator[int]:
    """``rows`` as a sum of blocks, the largest first; what is left below the smallest is the last one."""
    for size in _BLOCKS:
        while rows >= size:
            yield size
            rows -= size
    if rows:
        yield rows


def _seconds(work: Callable[[], Any]) -> float:
    """The least of some tries, after one that sets things up."""
    work()
    taken = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)
