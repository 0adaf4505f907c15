"""Settings as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlainSettings:
    """What the settings of every evaluation can do."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data as JSON reads it back (lists, not tuples)."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
