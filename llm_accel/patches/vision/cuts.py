"""Visual tokens that leave between two decoder layers: hooks on the layers, and nothing on their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from llm_accel.cache.attention import Attention
from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import Cut, CutView, LastQuery
from llm_accel.patches.vision.rows import columns, gathered, per_token

if TYPE_CHECKING:
    from llm_accel.patches.session import Session


class CutHook:
    """Forward hook of a layer after which tokens may leave. The decoder records its output without them."""

    def __init__(self, cut: Cut, title: str, layer: int) -> None:
        self.cut = cut
        self.title = title
        self.layer = layer

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The layer's output [B, n, C] without the rows that leave."""
        session: Session | None = kwargs.get("llm_accel")
        if session is None or not _cuts_here(session, self.cut) or session.visual.cut is not None:
            return None
        state, rows = session.visual, session.visual.rows
        assert rows is not None
        if rows.visual is None:
            raise UnsupportedCallError(
                f"{self.title} must know which tokens are visual; give input_ids instead of inputs_embeds."
            )
        scores, state.scores = state.scores, None
        if not bool(rows.visual.any()):
            return None
        if session.prompt_end is not None:
            raise UnsupportedCallError(
                f"{self.title} decides once the prompt is complete, and this one comes in chunks; leave out "
                "prefill_chunk_size."
            )
        if scores is not None:
            scores = scores[:, -rows.real.shape[1] :]
        hidden = output[0] if isinstance(output, tuple) else output
        keep = self.cut.keep(CutView(rows.visual, rows.real, scores, hidden, self.layer, rows.surplus))
        if bool((keep >= rows.real).all()):
            return None
        state.cut = rows.take(keep)
        state.exit_layer = self.layer
        state.update_layers(session, first_layer=self.layer + 1)
        hidden = gathered(hidden, state.cut.to(hidden.device), 0.0)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class BehindCutHook:
    """Forward pre-hook of the layers after it: what was made for all rows is cut to the remaining ones."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cuts rotary phases, position ids, the mask of a recurrent layer."""
        session: Session | None = kwargs.get("llm_accel")
        cut = None if session is None else session.visual.cut
        if session is None or cut is None:
            return None
        changed = per_token(kwargs, cut)
        phases = kwargs.get("position_embeddings")
        if isinstance(phases, Tensor):
            changed["position_embeddings"] = columns(phases, cut, -2)
        elif phases is not None:
            changed["position_embeddings"] = tuple(columns(part, cut, -2) for part in phases)
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = columns(kwargs["position_ids"], cut, -1)
        if self.layer not in session.ours:  # it has no length per row, and must not read padding
            changed["attention_mask"] = (cut >= 0).long()
        return args, kwargs | changed


def _cuts_here(session: Session, cut: Cut) -> bool:
    """Whether the running call brings rows of a prompt that the cut concerns."""
    rows = session.visual.rows
    return rows is not None and not (cut.surplus_only and rows.surplus is None)


def record_scores(
    session: Session,
    index: int,
    tensors: tuple[Tensor, Tensor, Tensor],
    start: Tensor | None,
    attention: Attention,
) -> None:
    """Records the scores that the call's last query gives to all entries, where a cut after this layer uses
    them. ``tensors`` are query, key and value. Called between the attention of a layer and its eviction."""
    cut, rows = session.plan.cut, session.visual.rows
    if cut is None or cut.score is None or index not in cut.layers or not _cuts_here(session, cut):
        return
    query, key, value = tensors
    assert rows is not None
    if rows.visual is not None:
        visual = F.pad(rows.visual.to(key.device), (key.shape[2] - rows.visual.shape[1], 0))
        softmax = attention.softmax(key.shape[-1])
        session.visual.scores = cut.score(
            LastQuery(query[:, :, -1:], key, value, visual, start=start, **softmax, heads=session.plan.heads)
        )
