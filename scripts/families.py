"""Judges every model family of the installed transformers and writes ``docs/families.md``.

    python scripts/families.py                        # all of them: minutes
    python scripts/families.py --only text/llama,text/gemma2
    python scripts/families.py --check --share 20     # is the page what a share of the families gives today?

Each family is built tiny, with random weights, and goes through the calls of ``tests/families``.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the tests, which are not part of the package

from tests.families.judge import FAMILIES  # noqa: E402
from tests.families.page import page  # noqa: E402
from tests.families.stock import EXACT, NOISE  # noqa: E402
from tests.families.sweep import TIMEOUT, sweep  # noqa: E402
from tests.families.verdict import Family  # noqa: E402

RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "families.md"
UNFINISHED = ROOT / "build" / "families.jsonl"


def main() -> int:
    """1 where a family is wrong or fails, or where ``--check`` finds a difference."""
    options = _parser().parse_args()
    stored = _stored()
    if options.render:
        PAGE.write_text(page(stored), encoding="utf-8")
        return 0
    cases = _cases(options)
    results = _run(cases, options)
    bad = [case for case in cases if results[case].failed]
    for case in bad:
        print(f"{case} {results[case].status}: again with python scripts/families.py --only '{case}'", file=sys.stderr)
    if options.check:
        return int(bool(bad) | _differs(stored, results))
    _store(stored, results, whole=len(cases) == len(FAMILIES))
    return int(bool(bad))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names such as text/llama, separated by commas")
    parser.add_argument("--kind", choices=("text", "vision"), help="text or vision families only")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="one in N families")
    parser.add_argument("--turn", type=int, default=0, metavar="K", help="which of the N shares")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one family")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has judged")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page says something else")
    parser.add_argument("--render", action="store_true", help="run nothing; write the page from its JSON")
    return parser


def _cases(options: argparse.Namespace) -> list[str]:
    if options.only:
        wanted = [name if "/" in name else f"text/{name}" for name in options.only.split(",")]
        if unknown := [name for name in wanted if name not in FAMILIES]:
            raise SystemExit(f"unknown: {', '.join(unknown)}; names are text/NAME or vision/NAME of this transformers")
        return wanted
    shared = [case for case in FAMILIES if zlib.crc32(case.encode()) % options.share == options.turn % options.share]
    return [case for case in shared if options.kind is None or case.startswith(options.kind)]


def _run(cases: list[str], options: argparse.Namespace) -> dict[str, Family]:
    done: dict[str, Family] = {}
    UNFINISHED.parent.mkdir(exist_ok=True)
    if options.resume and UNFINISHED.exists():
        lines = UNFINISHED.read_text(encoding="utf-8").splitlines()
        done = {case: Family.from_dict(data) for case, data in map(json.loads, lines)}
    else:
        UNFINISHED.write_text("", encoding="utf-8")

    def note(case: str, family: Family) -> None:
        with UNFINISHED.open("a", encoding="utf-8") as file:
            file.write(json.dumps([case, family.to_dict()]) + "\n")
        print(f"{case:<40} {family.status:<10} {family.seconds:5.1f} s", file=sys.stderr, flush=True)

    left = [case for case in cases if case not in done]
    done |= sweep(left, options.jobs, options.timeout, note)
    return {case: done[case] for case in cases}


def _stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"families": {}}


def _store(stored: dict[str, Any], results: dict[str, Family], whole: bool) -> None:
    import torch
    import transformers

    families = {} if whole else dict(stored["families"])
    families |= {case: family.to_page() for case, family in results.items()}
    head = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "command": "python scripts/families.py",
        "bar": EXACT,
        "noise": NOISE,
    }
    data = head | {"families": dict(sorted(families.items()))}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(family)}" for case, family in data["families"].items())
    RESULTS.write_text(f'{json.dumps(head)[:-1]}, "families": {{\n{lines}\n}}}}\n', encoding="utf-8")
    PAGE.write_text(page(data), encoding="utf-8")


def _differs(stored: dict[str, Any], results: dict[str, Family]) -> bool:
    """Says where the stored verdicts, or the page made of them, are not those of today."""
    pages = {case: (stored["families"].get(case), family.to_page()) for case, family in results.items()}
    old = [
        case for case, (then, now) in pages.items() if then is None or Family.by_method(then) != Family.by_method(now)
    ]
    if old:
        print(f"docs/families.json is old: {', '.join(old)}; run python scripts/families.py", file=sys.stderr)
    if page(stored) != PAGE.read_text(encoding="utf-8"):
        print("docs/families.md is old: run python scripts/families.py --render", file=sys.stderr)
        return True
    return bool(old)


if __name__ == "__main__":
    sys.exit(main())
