"""Real checkpoints by short names: where ``python -m benchmarks.real`` puts them, outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

from llm_accel.errors import ConfigError

CHECKPOINTS = ("smollm2-135m", "gemma3-270m")


def checkpoint_path(name: str, cache: Path | None = None) -> Path:
    """The folder of a checkpoint, there or not; below ``$XDG_CACHE_HOME`` or ``~/.cache`` unless ``cache`` is given."""
    base = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llm_accel"
    return base / "models" / name


def is_fetched(folder: Path) -> bool:
    """Whether a checkpoint's folder is there; it gets its name only once all files are in it."""
    return (folder / "config.json").is_file()


def resolve_model(name: str) -> str:
    """What to load for ``--model name``: a checkpoint's folder for its short name, everything else as it is. A folder
    of that name in the working directory comes first.

    Raises:
        ConfigError: the checkpoint has not been fetched.
    """
    if name not in CHECKPOINTS or Path(name).is_dir():
        return name
    path = checkpoint_path(name)
    if not is_fetched(path):
        raise ConfigError(
            f"--model {name!r} is not in {path}: run `make real`, or `python -m benchmarks.real {name}`, in a checkout "
            "of the repository, which fetches and converts it once; or give a HuggingFace id or a folder."
        )
    return str(path)
