"""Writes the method table of the README from the registry; with ``--check`` only says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llm_accel.method_table import markdown

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- method table: written by scripts/readme_table.py -->"
END = "<!-- method table: end -->"


def with_table(text: str, table: str) -> str:
    """The README with ``table`` between its markers; ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md needs one {BEGIN!r} followed by one {END!r}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    """1 when ``--check`` finds an old table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the table is old")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = with_table(old, markdown())
    if check and new != old:
        print("README.md: the method table is old; run `make readme`", file=sys.stderr)
        return 1
    if new != old:
        README.write_text(new, encoding="utf-8")
        print("README.md: method table written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
