"""What the machine can do at best, measured on it, and what a step or a prompt needs at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_accel.common.generation import Clock

_REPEATS = 7


@dataclass(frozen=True)
class Bounds:
    """Rates of this machine with the threads that the benchmark has.

    Attributes:
        copy: bytes per second, read and written, of a copy.
        triad: the same of ``a = b + s * c``.
        flop: floating-point operations per second of a matrix product in the model's type.
    """

    copy: float
    triad: float
    flop: float

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


@dataclass(frozen=True)
class Work:
    """What a model must read and compute, whatever runs it.

    Attributes:
        weight_bytes: all parameters.
        step_bytes: parameters that a decode step reads: all but the rows of the input embedding and a vision tower.
            Mixtures of experts read fewer.
        token_flop: operations per prompt token outside of attention.
        layers: layers of the language model.
        width: channels of all query heads together, the values' width.
    """

    weight_bytes: int
    step_bytes: int
    token_flop: float
    layers: int
    width: int

    @staticmethod
    def of(model: Any) -> Work:
        """Read off the modules of a model."""
        decoder, config = model.get_decoder(), model.config.get_text_config()
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        inside = [p for p in decoder.parameters() if p is not table]
        head_bytes = 0 if head is None else head.weight.nbytes
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Work(
            weight_bytes=sum(p.nbytes for p in model.parameters()),
            step_bytes=sum(p.nbytes for p in inside) + head_bytes,
            token_flop=2.0 * sum(p.numel() for p in inside),
            layers=int(config.num_hidden_layers),
            width=int(config.num_attention_heads) * int(head_dim),
        )

    def prompt_flop(self, length: int, batch: int) -> float:
        """Operations of a dense prefill of the language model, causal attention counted by half."""
        attention = 4.0 * self.layers * self.width * length * (length + 1) / 2
        return batch * (self.token_flop * length + attention)
