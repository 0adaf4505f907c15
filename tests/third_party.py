"""Packages of third parties that declare methods: what an installation leaves in a directory on the path."""

from __future__ import annotations

from pathlib import Path

from tests.pages import DOCS, blocks

KEY_NORM = blocks(DOCS / "guides" / "own_method.md", "python")[0]  # the method that the tutorial writes


def install(place: Path, package: str, code: str = KEY_NORM, **methods: str) -> None:
    """Writes a module of ``code`` and the metadata of its package, which declares ``methods``, name=class."""
    (place / f"{package}.py").write_text(code, encoding="utf-8")
    info = place / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8")
    points = "".join(f"{name} = {package}:{value}\n" for name, value in methods.items())
    (info / "entry_points.txt").write_text(f"[llm_accel.methods]\n{points}", encoding="utf-8")
