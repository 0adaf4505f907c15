"""The page of families, from the stored verdicts."""

from __future__ import annotations

from typing import Any

from tests.families.verdict import FAILS, NOT_BUILT, NOT_JUDGED, REFUSED, RIGHT, WRONG

HEADINGS = {
    WRONG: "Wrong",
    FAILS: "Accepted, then fails",
    RIGHT: "Right",
    REFUSED: "Refused",
    NOT_JUDGED: "Not judged",
    NOT_BUILT: "Not built",
}


def page(data: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    lines = [
        "# Model families",
        "",
        f"Every family of transformers {data.get('transformers')}, as `{data.get('command')}` found it.",
        "",
    ]
    for kind, title in (("text", "Text models"), ("vision", "Vision-language models")):
        families = {
            case.split("/", 1)[1]: family for case, family in data["families"].items() if family["kind"] == kind
        }
        if families:
            lines += [f"## {title}", "", _counts(families), ""]
            for status, heading in HEADINGS.items():
                lines += _section(heading, {n: f for n, f in families.items() if f["status"] == status})
    return "\n".join(lines).rstrip() + "\n"


def _counts(families: dict[str, Any]) -> str:
    counts = [(status, sum(f["status"] == status for f in families.values())) for status in HEADINGS]
    return f"{len(families)} families: " + ", ".join(f"{count} {status}" for status, count in counts if count) + "."


def _section(heading: str, families: dict[str, Any]) -> list[str]:
    if not families:
        return []
    lines = [f"### {heading}", "", "| family | |", "| --- | --- |"]
    for name, family in families.items():
        lines.append(f"| `{name}` | {_cell(family)} |")
    return [*lines, ""]


def _cell(family: dict[str, Any]) -> str:
    if family["why"]:
        return _plain(family["why"])
    by_reason: dict[tuple[str, str], list[str]] = {}
    for method, verdict in family["methods"].items():
        by_reason.setdefault((verdict["status"], verdict["why"]), []).append(method)
    if len(by_reason) == 1:
        return "every method"
    parts = [
        f"{', '.join(methods)}: {status}{f' ({_plain(why)})' if why else ''}"
        for (status, why), methods in by_reason.items()
    ]
    return "; ".join(parts)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
