"""What a run ran on: versions, hardware, and fingerprints of weights."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm_accel import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "triton")


def versions() -> dict[str, str | None]:
    """Those of :func:`packages`, and the commit of the source tree."""
    return packages() | {"git_commit": _commit()}


def packages() -> dict[str, str | None]:
    """Versions of Python and of what matters here; None for what is not installed."""
    found: dict[str, str | None] = {"llm_accel": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """Commit of the source tree that the package runs from; None where it is installed elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--show-prefix", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    prefix, _, commit = done.stdout.partition("\n")  # another prefix: the package lies inside some other repository
    return commit.strip() or None if done.returncode == 0 and prefix == "llm_accel/common/" else None


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine as far as timings depend on it."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory"] = properties.total_memory
    return found


def weights_digest(model: Any) -> str:
    """A fingerprint of a model: name, shape, type and first numbers of every parameter, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        head = tensor.detach().flatten()[:16].float().cpu().tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {head}\n".encode())
    return digest.hexdigest()[:16]
