"""The code in README and docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_accel.methods import PromptCompression

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def tutorial_method() -> type[PromptCompression]:
    """The method that the tutorial writes, a score and nothing else, compiled from the page."""
    names: dict[str, Any] = {}
    page = DOCS / "guides" / "own_method.md"
    exec(compile(blocks(page, "python")[0], page.name, "exec", 0, True), names)
    method: type[PromptCompression] = names["KeyNorm"]
    return method
