"""The page of families, from the stored verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.families.verdict import FAILS, NOT_BUILT, NOT_JUDGED, REFUSED, RIGHT, WRONG

HEADINGS = {
    WRONG: "Wrong",
    FAILS: "Accepted, then fails",
    RIGHT: "Right",
    NOT_JUDGED: "Accepted, not judged",
    REFUSED: "Refused",
    NOT_BUILT: "Not built",
}
INTRODUCTION = """# Model families

What each method does on every family of transformers {transformers}: `{command}` ran it and wrote this page.
`make families` does the same, and a part of the families, another every day, is judged with the other tests.

A family is built tiny, with random weights wide enough for sharp attention, in fp32. A method that `apply` accepts goes
through every call that the unpatched model can do: one row and left-padded rows, a budget above the prompt and one
below, a second turn, the prompt in chunks.

- **Right**: with nothing to evict, logits are those of the dense model. With entries evicted, the logits of every step
  are those of the unpatched model whose attention hides by hand what `report().layers[i].kept` says is gone; padded
  rows are answered as each row alone. They differ by at most {bar} of the largest logit, or by {noise} times what
  the unpatched model itself differs by when its attention adds up in another order. After `remove`, logits have the
  same bits and no hook is left.
- **Refused**: `apply` raises before it touches the model, for the reason given; the model answers with the same bits.
- **Accepted, not judged**: `apply` accepts, and the tests have no input for it.
- **Not built**: this transformers, without further packages, does not make a tiny model of it that answers.
"""
TITLES = {
    "text": ("Text models", "`AutoModelForCausalLM`; options that change what attention is stand behind a colon"),
    "vision": ("Vision-language models", "`AutoModelForImageTextToText`, prompts with one image in each row"),
}
LIMITS = "What the unpatched model does not do"


def page(data: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    lines = [INTRODUCTION.format(**{name: data[name] for name in ("transformers", "command", "bar", "noise")})]
    for kind, (title, names) in TITLES.items():
        families = {
            case.split("/", 1)[1]: family for case, family in data["families"].items() if family["kind"] == kind
        }
        if families:
            lines += [f"## {title}", "", f"{_counts(families)} ({names}).", ""]
            for status, heading in HEADINGS.items():
                lines += _section(heading, {n: f for n, f in families.items() if f["status"] == status})
            lines += _limits({name: family for name, family in families.items() if family["status"] == RIGHT})
    return "\n".join(lines).rstrip() + "\n"


def _counts(families: dict[str, Any]) -> str:
    counts = [(status, sum(family["status"] == status for family in families.values())) for status in HEADINGS]
    return f"{len(families)} configurations: " + ", ".join(f"{count} {status}" for status, count in counts if count)


def _section(heading: str, families: dict[str, Any]) -> list[str]:
    """A table of families that are alike in everything but their name."""
    if not families:
        return []
    alike: dict[str, list[str]] = {}
    for name, family in families.items():
        alike.setdefault(_said(name, family), []).append(name)
    rows = [f"| {_names(names)} | {said} |" for said, names in sorted(alike.items(), key=lambda one: -len(one[1]))]
    return [f"### {heading}", "", "| families | |", "| --- | --- |", *rows, ""]


def _said(name: str, family: dict[str, Any]) -> str:
    """What is said of a family, without its name."""
    if family["why"] or not family["methods"]:
        return _plain(family["why"], name)
    by_verdict: dict[tuple[str, str], list[str]] = {}
    for method, verdict in family["methods"].items():
        by_verdict.setdefault((verdict["status"], _plain(verdict["why"], name)), []).append(method)
    if len(by_verdict) == 1:
        return "every method"
    parts = [
        f"{_names(methods)}: {status}{f' ({why})' if why else ''}"
        for (status, why), methods in sorted(by_verdict.items(), key=lambda one: -len(one[1]))
    ]
    return "<br>".join(parts)


def _limits(families: dict[str, Any]) -> list[str]:
    """What the stock models cannot do themselves, and so no method was asked to."""
    notes: dict[str, list[str]] = {}
    for name, family in families.items():
        for note in family["notes"]:
            notes.setdefault(_plain(note, name), []).append(name)
    if not notes:
        return []
    rows = [f"| {_names(names)} | {note} |" for note, names in notes.items()]
    return [f"### {LIMITS}", "", "No method was asked to either.", "", "| families | |", "| --- | --- |", *rows, ""]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain(text: str, name: str) -> str:
    """Text for a cell of a table, in which no family names itself."""
    family = name.partition(":")[0]
    for itself in (f"{family}_text", family, family.replace("-", "_")):
        text = text.replace(f"{itself} ", "this family ", 1) if text.find(itself) >= 0 else text
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")
