"""Cache layers whose tensors can be lent to a compiled decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_accel.patches.compiled.cache import Lease


class Lendable:
    """What is lent comes back before anybody looks at it.

    Attributes:
        lease: what holds the tensors while decoding runs on buffers of fixed size, else None.
    """

    lease: Lease | None = None

    def __getattr__(self, name: str) -> Any:
        """Reached for what is not there, because it is lent or because there is no such attribute."""
        lease: Lease | None = self.__dict__.get("lease")
        if lease is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        lease.end()
        return getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        if self.lease is not None:
            self.lease.end()
        return self.__dict__
