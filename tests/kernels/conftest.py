"""Triton kernels are tested on a GPU, or on the CPU by ``make kernels``; elsewhere they cannot run."""

from __future__ import annotations

import torch

from llm_accel.kernels.dispatch import why_no_triton
from tests.kernels.triton_device import DEVICE

WHY_NOT = why_no_triton(torch.device(DEVICE))
collect_ignore = ["triton_kernels"] if WHY_NOT else []


def pytest_report_header() -> str:
    return f"Triton kernels: left out, {WHY_NOT}; see `make kernels`" if WHY_NOT else f"Triton kernels: on {DEVICE}"
