"""Times of calls on a GPU, and on a CPU where a dry run wants them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Timer = Callable[[Callable[[], object]], tuple[float, float, float]]  # median, 20 % and 80 % quantile in seconds


def timer_for(device: str) -> Timer:
    """How calls are timed on ``device``."""
    return gpu_timer if device.startswith("cuda") else cpu_timer


def gpu_timer(run: Callable[[], object]) -> tuple[float, float, float]:
    """On the current GPU, the L2 cache flushed before every call."""
    from triton.testing import do_bench

    median, low, high = do_bench(run, quantiles=[0.5, 0.2, 0.8])
    return median / 1e3, low / 1e3, high / 1e3


def cpu_timer(run: Callable[[], object]) -> tuple[float, float, float]:
    """Three calls: enough for a dry run, whose figures nobody reads."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), min(times), max(times)
