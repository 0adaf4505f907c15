"""``llm-accel doctor``: what is installed, which kernels and backends are live, and why the others are not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_accel import __version__
from llm_accel.assets import NEEDLE, VISION
from llm_accel.errors import ConfigError

_PACKAGES = ("torch", "transformers", "triton", "accelerate", "safetensors", "flash-attn", "matplotlib", "datasets")
_BUNDLED = {"needle": NEEDLE, "vision": VISION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``llm-accel doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the report on stdout and returns it as plain data."""
    data = collect()
    print(json.dumps(data, indent=2) if args.json else text(data))
    return data


def collect() -> dict[str, Any]:
    """Everything that a bug report needs, as plain data; loads no model and allocates nothing on a GPU."""
    gpus = _gpus()
    return {
        "llm_accel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "threads": _torch_threads()},
        "packages": {name: _version(name) for name in _PACKAGES},
        "transformers_window": _transformers_window(),
        "gpus": gpus,
        "backends": _backends(cuda=bool(gpus["devices"])),
        "kernels": _kernels(),
        "vllm": _vllm(),
        "bundled_models": {name: _bundled(folder) for name, folder in _BUNDLED.items()},
    }


def text(data: dict[str, Any]) -> str:
    """The report for a terminal."""
    sections = {
        "versions": [
            ("llm_accel", data["llm_accel"]),
            ("python", data["python"]),
            *((name, version or "not installed") for name, version in data["packages"].items()),
            ("supported", _window_line(data["transformers_window"])),
        ],
        "machine": [
            ("platform", data["platform"]),
            ("cpu", f"{data['cpu']['cores']} cores, {data['cpu']['threads']} threads in torch"),
            *(("gpu", _gpu_line(gpu)) for gpu in data["gpus"]["devices"]),
            *([("gpu", f"none: {data['gpus']['why_none']}")] if data["gpus"]["why_none"] else []),
        ],
        "attention backends": [_live(name, entry) for name, entry in data["backends"].items()],
        "kernels": [(name, f"{entry['backend']}: {entry['reason']}") for name, entry in data["kernels"].items()],
        "vllm": _vllm_lines(data["vllm"]),
        "bundled models": [
            (name, f"{entry['bytes'] / 2**20:.1f} MiB" if entry["present"] else f"missing: {entry['reason']}")
            for name, entry in data["bundled_models"].items()
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    blocks = []
    for title, rows in sections.items():
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    return "\n\n".join(blocks)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _transformers_window() -> dict[str, Any]:
    """The range of transformers that the package declares, and whether the installed version is in it."""
    from packaging.requirements import Requirement

    installed = _version("transformers")
    try:
        requirements = [Requirement(line) for line in metadata.requires("llm_accel") or ()]
    except metadata.PackageNotFoundError:
        requirements = []
    window = next((entry.specifier for entry in requirements if entry.name == "transformers"), None)
    if window is None:
        return {"supported": None, "inside": None}
    inside = window.contains(installed, prereleases=True) if installed else False
    return {"supported": ",".join(sorted(map(str, window), reverse=True)), "inside": inside}


def _window_line(window: dict[str, Any]) -> str:
    if window["supported"] is None:
        return "unknown: llm_accel is not installed as a package"
    return f"transformers {window['supported']}; the installed version is {'inside' if window['inside'] else 'OUTSIDE'}"


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _gpus() -> dict[str, Any]:
    """CUDA devices with name, memory, compute capability and driver; without any, the reason."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} and finds no device" if built else "this build of torch has no CUDA"
        return {"devices": [], "driver": _driver(), "why_none": why}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "driver": _driver(),
            }
        )
    return {"devices": devices, "driver": _driver(), "why_none": None}


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver, or None."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[0].isdigit() and "." in word), first)


def _gpu_line(gpu: dict[str, Any]) -> str:
    memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
    return f"{gpu['name']}, {memory}, compute capability {gpu['capability']}, driver {gpu['driver'] or 'unknown'}"


def _backends(cuda: bool) -> dict[str, dict[str, Any]]:
    """Attention of the base model: what ``attn_implementation`` can name on this machine, and Triton."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash, triton = is_flash_attn_2_available(), _version("triton")
    without_flash = _missing("flash-attn", cuda, "pip install 'llm_accel[flash]'")
    return {
        "eager": {"live": True, "reason": "plain torch"},
        "sdpa": {"live": True, "reason": "part of torch; the baseline of every comparison"},
        "flash_attention_2": {
            "live": flash,
            "reason": "flash-attn is installed" if flash else without_flash,
        },
        "triton": {
            "live": cuda and triton is not None,
            "reason": f"triton {triton}" if cuda and triton else _missing("triton", cuda, "it exists for Linux"),
        },
    }


def _missing(distribution: str, cuda: bool, remedy: str) -> str:
    parts = [] if _version(distribution) else [f"{distribution} is not installed ({remedy})"]
    return " and ".join(parts + ([] if cuda else ["there is no CUDA device"])) or f"{distribution} does not load here"


def _live(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    return name, f"{'live' if entry['live'] else 'off'}: {entry['reason']}"


def _kernels() -> dict[str, dict[str, str]]:
    """Every operation under ``llm_accel.kernels`` with the backend that it takes on this machine for a
    common problem (bf16, 128 channels per head, 4 query heads per key head), and why."""
    import torch

    from llm_accel.kernels.dispatch import Problem, all_ops

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found = {}
    for name, op in all_ops().items():
        try:
            backend, reason = op.explain(Problem(device, torch.bfloat16, head_dim=128, group=4))
        except ConfigError as error:
            backend, reason = "none", str(error)
        found[name] = {"backend": backend, "reason": reason}
    return found


def _vllm() -> dict[str, Any] | None:
    """The installed vLLM, and for each feature of the plug-in why it is off, or None; None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from llm_accel.integrations.vllm import compat

    features = {name: compat.problem(name) for name in compat.FEATURES}
    return {"version": compat.version(), "tested": list(compat.TESTED), "inside": compat.tested(), "features": features}


def _vllm_lines(data: dict[str, Any] | None) -> list[tuple[str, str]]:
    if data is None:
        return [("vllm", "not installed (pip install 'llm_accel[vllm]')")]
    low, high = data["tested"]
    place = "inside" if data["inside"] else "OUTSIDE of"
    return [
        ("vllm", f"{data['version']}, {place} the tested range {low} to {high}"),
        *((name, "on" if reason is None else f"off: {reason}") for name, reason in data["features"].items()),
    ]


def _bundled(folder: Path) -> dict[str, Any]:
    """Whether the weights of a bundled model came with the package, and how large all of them are."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        return {"present": False, "bytes": 0, "reason": f"no *.safetensors in {folder}"}
    return {"present": True, "bytes": sum(path.stat().st_size for path in files), "reason": "comes with the package"}
