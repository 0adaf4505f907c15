"""Visual tokens that leave between two decoder layers: hooks on the layers, and nothing on their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_accel.errors import UnsupportedCallError
from llm_accel.kernels.column_votes import column_votes
from llm_accel.methods import CutView, LayerCut
from llm_accel.patches.base_attention import softmax_of
from llm_accel.patches.vision.rows import columns, gathered

if TYPE_CHECKING:
    from llm_accel.patches.session import Session


class CutHook:
    """Forward hook of the layer after which tokens leave. The decoder records its output without them."""

    def __init__(self, method: LayerCut, layer: int) -> None:
        self.method = method
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The layer's output [B, n, C] without the rows that leave."""
        session: Session | None = kwargs.get("llm_accel")
        if session is None or session.visual.rows is None:
            return None
        state, rows = session.visual, session.visual.rows
        if rows.visual is None:
            raise UnsupportedCallError(
                f"{self.method.spec()} must know which tokens are visual; give input_ids instead of inputs_embeds."
            )
        attention, state.attention = state.attention, None
        if not bool(rows.visual.any()):
            return None
        if session.prompt_end is not None:
            raise UnsupportedCallError(
                f"{self.method.spec()} decides once the prompt is complete, and this one comes in chunks; leave out "
                "prefill_chunk_size."
            )
        if attention is not None:
            attention = attention[:, -rows.real.shape[1] :]
        keep = self.method.keep(CutView(rows.visual, rows.real, attention))
        if bool((keep >= rows.real).all()):
            return None
        state.cut = rows.take(keep)
        state.exit_layer = self.layer
        state.settle(session, first_layer=self.layer + 1)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = gathered(hidden, state.cut.to(hidden.device), 0.0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class BehindCutHook:
    """Forward pre-hook of the layers behind it: what was made for all rows is cut to those that are left."""

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cuts rotary phases and position ids."""
        session: Session | None = kwargs.get("llm_accel")
        cut = None if session is None else session.visual.cut
        if cut is None:
            return None
        changed: dict[str, Any] = {}
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(columns(part, cut, -2) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = columns(kwargs["position_ids"], cut, -1)
        return args, kwargs | changed


def watch(
    session: Session, index: int, query: Tensor, key: Tensor, start: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Remembers the attention of the call's last query, fp32 [B, S], mean over heads, where a cut behind this layer
    looks at it. Called between the attention of a layer and its eviction."""
    if session.plan.cut is None or not session.plan.cut.needs_attention or session.visual.rows is None:
        return
    if index == session.plan.cut.after(session.plan.layers):
        softmax = softmax_of(kwargs, key.shape[-1])
        votes = column_votes(query[:, :, -1:], key, start, heads=key.shape[1], group="mean", **softmax)
        session.visual.attention = votes.mean(1)
