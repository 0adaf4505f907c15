"""VAR: attention that sinks take goes to the image, in heads that look at it (arXiv 2503.03321).

    sinks S:   tokens of the prompt with max_{d in D} |x_d| / sqrt(mean x^2 + 1e-6) > tau, x the input of the layer
    a head acts on a query where m = sum_{j in V} a_j >= least and r = sum_{j in V without S} a_j / m >= rho
    a_j <- (1 - remove) a_j on S,   a_j <- a_j (1 + remove sum_S a / sum_{V without S} a) on V without S

V are the visual tokens, text is among the sinks, and rows still sum to one. D are the few dimensions of the language
model in which sinks stand out; they are found with its first token (``dims``). Layers from the third to the last but
one, queries that are no visual tokens. A head and query that see no visual sink are left alone.

The paper removes 0.6 of what sinks get; its code multiplies it by 0.6, which is ``remove=0.4`` here, and lets a head
act where the sinks' share is at most rho, which agrees with the paper at rho = 0.5 only.

    out' = out - remove sum_S a_j v_j + (remove sum_S a / sum_{V without S} a) sum_{V without S} a_j v_j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llm_accel.methods.base import LAYERS, MethodInfo, option
from llm_accel.methods.visual.grounding import Columns, WeightShift

VISUAL, SINK = 1, 2  # bits of a mark
_EPSILON = 1e-6


@dataclass(frozen=True)
class VAR(WeightShift):
    """Gives attention of sinks to visual tokens that are none; ``remove=0`` switches it off."""

    remove: float = option("share of the attention of sinks that is taken from them, in [0, 1]", 0.6, share="[0, 1]")
    rho: float = option(
        "least share of a head's attention to the image that goes to no sink: 0.5 against hallucination, 0.8 in "
        "general, 0.9 for questions about details",
        0.5,
        share="[0, 1]",
    )
    least: float = option("least attention of a head to the image", 0.2, share="[0, 1]")
    tau: float = option("how far a sink stands out from the mean square of its channels", 20.0, most=1e6, least=0)
    dims: tuple[int, ...] | None = option(
        "dimensions in which sinks stand out, for example 1415+2533; None: found with the first token of the model",
        None,
        most=2**24,
    )
    first_layer: int | None = option(
        "the first layer that is corrected; the last one never is. None: the third, or the first of a model with fewer",
        None,
        most=LAYERS,
        least=0,
    )

    name: ClassVar[str] = "var"
    info: ClassVar[MethodInfo] = MethodInfo(
        "Visual Attention Redistribution, arXiv 2503.03321",
        "nothing; for answers that rest on the image",
        frees_memory=False,
        kinds=("vision",),
    )

    def validate(self) -> None:
        if self.dims is not None and any(dim < 0 for dim in self.dims):
            self.fail("dims", "channels of the language model, counted from 0, or None")

    @property
    def acts(self) -> bool:
        return self.remove > 0

    @property
    def reads_states(self) -> bool:
        return True

    @property
    def wants_states(self) -> bool:
        return self.dims is None

    def told(self, states: Sequence[Tensor], layers: int) -> VAR:
        middle = torch.stack([prominence(one)[0, 0] for one in states[layers // 4 : max(1, 3 * layers // 4)]])
        return replace(self, dims=tuple((middle.median(0).values > self.tau).nonzero()[:, 0].tolist()))

    def acting_layers(self, layers: int) -> tuple[int, ...]:
        first = max(0, min(2, layers - 2)) if self.first_layer is None else self.first_layer
        self._check_layers((first,), layers)
        return tuple(range(first, layers - 1))

    def marks(self, visual: Tensor, given: Tensor | None, hidden: Tensor | None) -> Tensor:
        assert hidden is not None and self.dims is not None
        marks = visual.to(torch.int8) * VISUAL
        if not self.dims:
            return marks
        sinks = (prominence(hidden)[..., list(self.dims)] > self.tau).any(-1)
        return marks + sinks.to(marks) * SINK

    def shift(self, view: Columns) -> tuple[Tensor, Tensor]:
        weights = view.weights
        visual, sink = (view.marks & VISUAL) > 0, (view.marks & SINK) > 0
        paid = (weights * visual).sum(-1)
        wanted = weights * (visual & ~sink)
        useful, lost = wanted.sum(-1), (weights * sink).sum(-1)
        sinks_seen = (view.logits.isfinite() & visual & sink).any(-1)
        active = sinks_seen & (paid >= self.least) & (useful >= self.rho * paid) & (useful > 0)
        share = torch.where(active, self.remove * lost / useful.where(active, 1.0), 0.0)
        added = wanted * share[..., None] - self.remove * (weights * sink) * active[..., None]
        return torch.ones_like(paid), added

    def counted(self, marks: Tensor) -> dict[str, list[int]]:
        return {
            "sinks": ((marks & SINK) > 0).sum(-1).tolist(),
            "visual_sinks": (marks == VISUAL | SINK).sum(-1).tolist(),
        }


def prominence(hidden: Tensor) -> Tensor:
    """Magnitude of each channel against the root of the mean square of all, fp32 [B, n, C]."""
    hidden = hidden.float()
    return hidden.abs() / (hidden.square().mean(-1, keepdim=True) + _EPSILON).sqrt()
