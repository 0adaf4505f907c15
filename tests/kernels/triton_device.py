"""Where Triton kernels run in this test run, and how close they must come."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_accel.kernels.dispatch import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
# RMS of the error over RMS of the oracle; the oracle is float64 on the rounded inputs
RATIO = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
TINY = 1e-6


def assert_close(name: str, ours: Tensor, oracle: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Root-mean-square error against the oracle within the tolerance of the inputs' dtype; no NaN, same shape."""
    assert ours.shape == oracle.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    assert not ours.isnan().any(), f"{name}: {int(ours.isnan().sum())} of {ours.numel()} entries are NaN"
    error = (ours.double() - oracle.double().to(ours.device)).square().mean().sqrt().item()
    scale = oracle.double().square().mean().sqrt().item()
    assert error <= slack * RATIO[dtype] * scale + TINY, f"{name}: RMS error {error:.2e} at RMS {scale:.2e}"
