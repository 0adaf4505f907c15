"""The best rates of this machine, as measured on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from llm_accel.common.generation import Clock

_REPEATS = 7


@dataclass(frozen=True)
class Bounds:
    """Rates of this machine with the threads that the benchmark has."""

    copy: float  # bytes per second, read and written, of a copy
    triad: float  # the same of ``a = b + s * c``
    flop: float  # floating-point operations per second of a matrix product in the model's type

    @property
    def bandwidth(self) -> float:
        """The better of the two."""
        return max(self.copy, self.triad)

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self) | {"bandwidth": self.bandwidth}


Timer = Callable[[Callable[[], object]], float]  # seconds of a call


def measure_bounds(
    device: torch.device, dtype: torch.dtype, timer: Timer | None = None, count: int = 0, size: int = 0
) -> Bounds:
    """What the machine reaches with arrays far larger than caches.

    Args:
        timer: seconds of a call; by default the median over repeats.
        count: fp32 numbers of an array; by default 256 MiB on a CPU, 1 GiB on a GPU.
        size: rows and columns of the matrices.
    """
    timer = timer or (lambda run: _seconds(run, device))
    on_cpu = device.type == "cpu"
    count, size = count or (2**26 if on_cpu else 2**28), size or (1024 if on_cpu else 8192)
    target, one, other = (torch.ones(count, device=device) for _ in range(3))
    copied = timer(lambda: target.copy_(one))
    added = timer(lambda: torch.add(one, other, alpha=3.0, out=target))
    left = torch.randn(size, size, device=device).to(dtype)  # numbers all alike cost a GPU less power than real ones
    out = torch.empty_like(left)
    multiplied = timer(lambda: torch.matmul(left, left, out=out))
    return Bounds(2 * target.nbytes / copied, 3 * target.nbytes / added, 2 * size**3 / multiplied)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    clock, times = Clock(device), []
    for _ in range(_REPEATS + 1):
        begin = clock.now()
        run()
        times.append(clock.now() - begin)
    return statistics.median(times[1:])
