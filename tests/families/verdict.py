"""What the sweep says of a family: one verdict per method, and one of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

RIGHT, REFUSED, WRONG, FAILS, NOT_JUDGED, NOT_BUILT = "right", "refused", "wrong", "fails", "not judged", "not built"
BAD = (WRONG, FAILS)
# the first of these that a method of the family got is what the family is
ORDER = (WRONG, FAILS, RIGHT, NOT_JUDGED, REFUSED, NOT_BUILT)


@dataclass
class Verdict:
    """One method on one family.

    Attributes:
        status: ``RIGHT``, ``REFUSED`` at apply, ``WRONG`` (a difference, or traces left), ``FAILS`` (accepted and then
            an error that is none of ours, or every call refused) or ``NOT_JUDGED``.
        why: the message, the call and the figure.
        error: largest relative difference of logits that was seen, or None.
        notes: calls that this method refuses on this family.
    """

    status: str
    why: str = ""
    error: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Family:
    """One family.

    Attributes:
        kind: ``text`` or ``vision``.
        status: the worst of its methods, or ``NOT_BUILT``.
        why: why it could not be built, or the one reason for which every method was refused.
        methods: method -> verdict.
        notes: what the stock model itself cannot do, so that it was not asked.
        seconds: how long it took.
    """

    kind: str
    status: str
    why: str = ""
    methods: dict[str, Verdict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, kind: str, methods: dict[str, Verdict], notes: list[str]) -> Family:
        status = min((verdict.status for verdict in methods.values()), key=ORDER.index)
        reasons = {verdict.why for verdict in methods.values()}
        return cls(kind, status, reasons.pop() if len(reasons) == 1 else "", methods, notes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Family:
        methods = {name: Verdict(**verdict) for name, verdict in data["methods"].items()}
        return cls(**(data | {"methods": methods}))

    def to_page(self) -> dict[str, Any]:
        """What the page says: methods with the same verdict together, nothing that differs between two runs."""
        alike: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
        for name, verdict in self.methods.items():
            alike.setdefault((verdict.status, verdict.why, tuple(verdict.notes)), []).append(name)
        verdicts = [
            {"methods": methods, "status": status, "why": why, "notes": list(notes)}
            for (status, why, notes), methods in alike.items()
        ]
        return {"kind": self.kind, "status": self.status, "why": self.why, "verdicts": verdicts, "notes": self.notes}

    @staticmethod
    def by_method(page: dict[str, Any]) -> dict[str, Any]:
        """A page with the verdict of each method, so that pages compare equal whatever the order of methods."""
        told = {name: one | {"methods": name} for one in page["verdicts"] for name in one["methods"]}
        return page | {"verdicts": told}

    @property
    def bad(self) -> dict[str, Verdict]:
        """The methods that are wrong or fail."""
        return {name: verdict for name, verdict in self.methods.items() if verdict.status in BAD}

    @property
    def failed(self) -> bool:
        """Whether a method is wrong or fails, or the process ended."""
        return bool(self.bad) or self.status in BAD
