"""Functions that several Triton kernels share. Only modules of kernels import this one: it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """[M, K] x [K, N] with an fp32 sum. fp32 operands are multiplied as they are, never as TF32. The interpreter would
    multiply the bits of bf16 operands, so there, and only there, UPCAST makes them fp32 first."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def log2_logits(raw, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in base-2 units, so that exp2 gives the softmax; tanh as a sigmoid, which the interpreter knows too."""
    logits = raw * scaling
    if HAS_SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * (logits / softcap)) - 1.0)
    return logits * LOG2E


@triton.jit
def pivot(largest):
    """What to subtract before exp2: the largest logit, or 0 where nothing is visible, so that no NaN arises."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def log_sum(largest, total):
    """Log-sum-exp in base-2 units of what was added up as ``total`` relative to ``largest``; -inf of nothing."""
    return tl.where(total > 0.0, pivot(largest) + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
