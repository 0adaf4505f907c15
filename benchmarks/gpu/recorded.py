"""A plugin of pytest that writes down what kernels tests launch: ``-p benchmarks.gpu.recorded --launches FILE``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_accel.kernels.launch import Launch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", type=Path, required=True, help="file that they are written to, one JSON a line")


def pytest_configure(config: pytest.Config) -> None:
    path, run = config.getoption("--launches"), Launch.run

    def recorded(launch: Launch) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(described(launch), default=str) + "\n")
        run(launch)

    setattr(Launch, "run", recorded)  # noqa: B010


def described(launch: Launch) -> dict[str, Any]:
    """What decides which code a launch compiles to: numbers, and the types of tensors by their names in torch."""

    def kind(value: Any) -> Any:
        return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else value

    function = launch.kernel.fn
    return {
        "module": function.__module__,
        "kernel": function.__name__,
        "arguments": {name: kind(value) for name, value in launch.arguments.items()},
        "constants": dict(launch.constants),
        "warps": launch.warps,
        "stages": launch.stages,
    }
