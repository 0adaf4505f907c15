"""Fails when a Python file of the repository is longer than the limit: a sign that two things live in it."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 400
FOLDERS = ("llm_accel", "training", "tests", "benchmarks", "examples", "scripts", "docs")


def main() -> int:
    """Prints every file past the limit; 1 when there is one."""
    root = Path(__file__).resolve().parent.parent
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    for path, length in sorted(lengths.items(), key=lambda item: -item[1]):
        if length > LIMIT:
            print(f"{path.relative_to(root)}: {length} lines, {LIMIT} allowed", file=sys.stderr)
    longest = max(lengths.values(), default=0)
    print(f"{len(files)} Python files, the longest has {longest} lines")
    return int(longest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
