"""Several processes on one run, as ``accelerate launch`` and ``torchrun`` start them: each does a part of the grid and
appends to the same directory, the first one tells what came out."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from llm_accel.errors import ConfigError, LlmAccelError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # parts of a grid take unequally long; a process that dies is noticed at once


@dataclass(frozen=True)
class DistributedRun:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number among those on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> DistributedRun:
        """What the launcher has written into the environment; alone without one."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank = int(os.environ["RANK"])
        return cls(rank, int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def part(self, shard: tuple[int, int]) -> tuple[int, int]:
        """The shard of this process, where the run itself does the ``i``-th of ``n`` parts."""
        index, count = shard
        return index + count * self.rank, count * self.world

    def log(self, text: str) -> None:
        """To stderr, once for all processes."""
        if self.first:
            print(text, file=sys.stderr)

    def barrier(self) -> None:
        """Waits until all have come here.

        The group is one of gloo, on GPUs too: gloo notices at once that a process has died, where NCCL waits for its
        timeout. It is made here and not earlier, so that wrong options are named without waiting for anybody.

        Raises:
            LlmAccelError: one of them has ended before.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
                atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
            dist.barrier()
        except RuntimeError as error:
            raise LlmAccelError(
                "another process of this run ended early. What was measured is kept; the same command goes on there."
            ) from error

    def first_then_all(self, step: Callable[[], T]) -> T:
        """The first process takes a step before all others do."""
        if self.first:
            taken = step()
            self.barrier()
            return taken
        self.barrier()
        return step()


def started_alone() -> str | None:
    """What to say where ``accelerate launch`` was asked for several processes and has started one, as it does on a
    machine without several GPUs; else None."""
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if not several or "WORLD_SIZE" in os.environ:
        return None
    return (
        "warning: accelerate launch has started one process only, which does everything; without several GPUs it takes "
        "--multi_gpu to start more, on a CPU too. torchrun --nproc-per-node N -m llm_accel ... does the same."
    )


def check_alone(command: str, why: str) -> None:
    """Raises :class:`ConfigError` where a command that is one process was launched as several."""
    run = DistributedRun.here()
    if run.world > 1:
        raise ConfigError(f"{command} was started in {run.world} processes, but {why}. Start it without a launcher.")
