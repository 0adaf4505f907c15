"""``auto``: stands for the method and the budget that fit a model; ``apply`` puts these in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llm_accel.methods.base import ENTRIES, MethodConfig, MethodInfo, option
from llm_accel.methods.budget import DEFAULT_BUDGET, fraction
from llm_accel.methods.claims import Claim

SHARE = 0.25  # of the longest prompt that stays: shorter prompts keep more, and those within the budget everything
LEAST = 128  # entries below which no budget is chosen


@dataclass(frozen=True)
class Auto(MethodConfig):
    """Chooses method and budget when it is applied: by the model, by where the question stands, by the longest prompt
    and by memory. The budget is absolute, so that prompts within it are not cut: there the model is the dense one."""

    question: Literal["in_prompt", "later"] = option(
        "in_prompt: the prompt ends with what is asked; later: it is asked of the compressed cache", "in_prompt"
    )
    context: int | None = option(
        f"tokens of the longest prompts, {SHARE:.0%} of which stay; None: what the model was made for",
        None,
        most=ENTRIES,
        least=1,
    )
    memory: float | None = option(
        "GiB that the entries of all prompts together may take; None: nine tenths of what GPUs hold beside the weights",
        None,
        most=2**20,
    )
    rows: int = option("prompts that share this memory", 1, most=ENTRIES, least=1)
    budget: int | None = option("KV entries per KV head and layer; None: chosen", None, most=2 * ENTRIES, least=1)
    ratio: float | None = option("fraction of each prompt kept, instead of a budget", None, share="(0, 1]")

    name: ClassVar[str] = "auto"
    info: ClassVar[MethodInfo] = MethodInfo(
        "that of the method it chooses", "KV cache, by the method and budget that fit the model", needs_query=True
    )

    def validate(self) -> None:
        self.at_most_one("budget", "ratio")
        if self.memory is not None and self.memory <= 0:
            self.fail("memory", "a number above 0, in GiB")
        if self.memory is not None and (self.budget is not None or self.ratio is not None):
            self.at_most_one("memory", "budget" if self.budget is not None else "ratio")

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.KV: ""}

    def fewest(self, size: Mapping[str, Any], longest: int | None) -> int | None:
        """Entries per KV head and layer that ``size`` leaves of the longest prompts; None: unknown."""
        context = self.context or longest
        if "budget" in size:
            return int(size["budget"])
        return None if context is None else fraction(size["ratio"], context)

    def size(self, longest: int | None, fitting: int | None) -> tuple[dict[str, Any], str]:
        """``budget`` or ``ratio`` of the chosen method, and why.

        Args:
            longest: tokens that the model was made for; None: unknown.
            fitting: entries per KV head and layer that memory holds; None: no limit.

        Raises:
            ConfigError: memory holds too few.
        """
        if self.budget is not None or self.ratio is not None:
            given = {"budget": self.budget} if self.ratio is None else {"ratio": self.ratio}
            return given, "the budget was given"
        context = self.context or longest
        wanted = max(DEFAULT_BUDGET, fraction(SHARE, context or 1))
        why = f"{SHARE:.0%} of prompts of {context} tokens" if wanted > DEFAULT_BUDGET else f"at least {DEFAULT_BUDGET}"
        if fitting is not None and fitting < wanted:
            if fitting < LEAST:
                self.fail("memory", f"room for {LEAST} entries per KV head and layer; each prompt gets {fitting}")
            wanted, why = fitting, "what memory holds"
        return {"budget": wanted}, why
