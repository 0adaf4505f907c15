"""The roles a method can play. The patches know these roles and never a method by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.attention import AttentionView
from llm_accel.methods.base import ENTRIES, LAYERS, option
from llm_accel.methods.budget import Budgeted
from llm_accel.methods.claims import Claim
from llm_accel.methods.prompt_view import Depth, PromptView
from llm_accel.methods.selection import best_slots, per_head, total_order, without


@dataclass(frozen=True)
class ScoreAndKeep(Budgeted):
    """Role: decides, once the prompt is complete, which KV entries stay (per row, KV head and layer)."""

    skip_layers: tuple[int, ...] = option("layers that stay dense, for example 0+1", (), most=LAYERS)

    def validate(self) -> None:
        super().validate()
        if len(set(self.skip_layers)) != len(self.skip_layers) or any(index < 0 for index in self.skip_layers):
            self.fail("skip_layers", "distinct layer indices counted from 0")

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.KV: ""} if self.page_size is None else {Claim.KV: "", Claim.ORDER: ""}

    @property
    def deferred(self) -> bool:
        """Whether eviction waits for the first decode step."""
        return False

    @property
    def recompresses(self) -> bool:
        """Whether later turns cut the cache back to the budget."""
        return False

    @property
    def layers_compete(self) -> bool:
        """Whether layers share one budget, and evict together once the prompt is complete in all of them."""
        return False

    @property
    def observed_queries(self) -> int:
        """How many of the last queries the scores need."""
        return 0

    @property
    def page_size(self) -> int | None:
        """Entries per page of the store, for methods whose heads keep different numbers of entries; None where all
        heads of a layer keep the same number."""
        return None

    def layer_entries(self, length: int, depth: Depth) -> int:
        """Entries that a row which has seen ``length`` tokens keeps in one layer, per KV head on average."""
        return self.entries(length)

    def layer_entries_per_row(self, lengths: Tensor, depth: Depth) -> Tensor:
        """:meth:`layer_entries` for a tensor of row lengths, int64 [B], without a device synchronisation."""
        return self.entries_per_row(lengths)

    @property
    def cuts_every(self) -> int | None:
        """Entries above the budget at which layers are cut back to it while decoding, or None."""
        return None

    def row_entries(self, lengths: Tensor, view: PromptView) -> Tensor:
        """Entries per KV head that each row of ``lengths`` real entries keeps in this view, int64 [B]."""
        seen = lengths if view.seen is None else view.seen
        entries = torch.minimum(lengths, self.layer_entries_per_row(seen, view.depth))
        return torch.where(lengths - entries >= view.slack, entries, lengths)

    def widest(self, counts: Tensor, view: PromptView) -> int:
        """The largest of ``counts``; without a synchronisation where it is that of the longest row."""
        first_cut = view.seen is None and view.slack <= 1
        return self.layer_entries(view.slots, view.depth) if first_cut else int(counts.max())

    def score(self, view: PromptView) -> Tensor:
        """What each entry is worth, [B, kv_heads, S]: of any sign, compared as fp32, the higher ones stay. Padding may
        have any score."""
        raise NotImplementedError(f"{type(self).__name__} has no score(view), which says what each entry is worth.")

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        """:meth:`score`, and what decides where it is equal, of the same shape; None: the older entry stays."""
        return self.score(view), None

    def always_keep(self, view: PromptView) -> Tensor | None:
        """Entries that stay whatever their score, bool [B or 1, S] or [B, kv_heads, S], or None. ``reserved`` must
        count them. What the user protects stays without being named here."""
        return None

    def select(self, view: PromptView) -> Tensor:
        """Slots to keep: int64 [B, kv_heads, n], ascending; -1 first where a row or head keeps fewer than n. Asked
        only when some row keeps fewer entries than it has.

        Raises:
            ConfigError: a score or mask has another shape, or more entries are always kept than the budget has.
        """
        forced = self._forced(view)
        kept = self.allocate(self._order(view, forced), view)
        # one layer tells, so that the device is waited for only once; a graph cannot wait
        if forced is not None and view.depth.index == 0 and not torch.compiler.is_compiling():
            self._check_budget(kept, forced, view)
        return kept

    def select_all(self, views: Sequence[PromptView]) -> list[Tensor]:
        """:meth:`select` for all layers of a prompt, which are known together; asked where layers compete."""
        return [self.select(view) for view in views]

    def order(self, view: PromptView) -> Tensor:
        """The entries of a layer in the order in which they stay, int64 [B, kv_heads, S], see
        :func:`~llm_accel.methods.selection.total_order`.

        Raises:
            ConfigError: a score or mask has another shape.
        """
        return self._order(view, self._forced(view))

    def _order(self, view: PromptView, forced: Tensor | None) -> Tensor:
        score, tie_break = self.score_and_tie_break(view)
        self._check_shapes(view, score, tie_break)
        return total_order(score, view.valid, forced, tie_break)

    def _forced(self, view: PromptView) -> Tensor | None:
        """What the method always keeps and what the user protects."""
        forced = self.always_keep(view)
        if forced is not None:
            self._check_mask(view, forced)
        if view.protected is None:
            return forced
        return view.protected if forced is None else per_head(forced) | per_head(view.protected)

    def allocate(self, priority: Tensor, view: PromptView) -> Tensor:
        """What :meth:`select` returns, for entries in the order ``priority``, int64 [B, kv_heads, S], of
        :func:`~llm_accel.methods.selection.total_order`: every head of a row keeps the same number."""
        counts = self.row_entries(view.lengths, view)
        return best_slots(priority, counts, self.widest(counts, view))

    def _check_shapes(self, view: PromptView, score: Tensor, tie_break: Tensor | None) -> None:
        shape = (view.key.shape[0], view.kv_heads, view.slots)
        for name, given in (("score", score), ("tie_break", tie_break)):
            if given is not None and tuple(given.shape) != shape:
                raise ConfigError(
                    f"{self.name}: {name} is {tuple(given.shape)}; give {shape}, [batch, KV heads, entries]."
                )

    def _check_mask(self, view: PromptView, forced: Tensor) -> None:
        rows = view.key.shape[0]
        shape = (rows, view.kv_heads, view.slots)
        masks = [(1, view.slots), (rows, view.slots), shape]
        if forced.dtype != torch.bool or tuple(forced.shape) not in masks:
            raise ConfigError(
                f"{self.name}: always_keep is {forced.dtype} {tuple(forced.shape)}; give bool {masks[1]}, [batch, "
                f"entries], or {shape}, [batch, KV heads, entries]."
            )

    def _check_budget(self, kept: Tensor, forced: Tensor, view: PromptView) -> None:
        lost = without(kept, forced, view.valid)
        if bool(lost.any()):
            row = int(lost.long().argmax())
            raise ConfigError(
                f"{self.spec()} always keeps {int(per_head(forced).sum(-1).max())} entries, more than the "
                f"budget of row {row}: `reserved` is {self.reserved} and must count them all; raise the budget."
            )


@dataclass(frozen=True)
class PromptCompression(ScoreAndKeep):
    """Role: compresses the prompt once; what is decoded afterwards is appended whole."""

    compress: Literal["eager", "deferred"] = option(
        "eager: inside each layer at the end of the prompt; deferred: before the first decode step", "eager"
    )
    multi_turn: Literal["append", "recompress"] = option(
        "append: later turns are kept completely; recompress: after each later turn the cache is compressed to the "
        "budget, or to ratio of all tokens seen so far",
        "append",
    )
    recompress_every: int | None = option(
        "compress to the budget after each turn, and in decoding whenever this many entries were added; None: never",
        None,
        most=ENTRIES,
        least=1,
    )

    def validate(self) -> None:
        super().validate()
        if self.recompress_every is not None and self.ratio is not None:
            raise ConfigError(
                f"{self.name}: recompress_every={self.recompress_every} caps a cache whose prompt is not known; "
                f"give budget instead of ratio={self.ratio}."
            )

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        """What the report says of the choices that the method makes by itself: what -> (choice, meaning)."""
        return {}

    @property
    def deferred(self) -> bool:
        return self.compress == "deferred"

    @property
    def recompresses(self) -> bool:
        return self.multi_turn == "recompress" or self.recompress_every is not None

    @property
    def cuts_every(self) -> int | None:
        return self.recompress_every


@dataclass(frozen=True)
class StepView:
    """What a method sees of one layer when it chooses what the next token overwrites.

    Attributes:
        positions: original position of each slot, int64 [B, kv_heads, P]; -1 where a slot is empty.
        scores: attention received, fp32 [B, kv_heads, P], for methods that ask for it, else None.
    """

    positions: Tensor
    scores: Tensor | None


@dataclass(frozen=True)
class StepEviction(ScoreAndKeep):
    """Role: keeps the cache at its budget during decoding, by overwriting one entry per KV head and step."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.KV: "", Claim.ORDER: ""}

    @property
    def recompresses(self) -> bool:
        return True

    @property
    def relative_positions(self) -> bool:
        """Whether positions are ranks in the cache; all heads of such a method keep the same entries."""
        return False

    @property
    def hides(self) -> bool:
        """Whether entries are only hidden from later tokens and all stay stored: a simulation that frees no memory.
        Such a method is asked to ``select`` what the next token attends to besides itself, after each step."""
        return False

    @property
    def empty_slots(self) -> int:
        """Slots beyond the budget: 1 where the new token joins a full budget and an entry is evicted afterwards."""
        return 0

    @property
    def accumulates(self) -> bool:
        """Whether the method ranks entries by the attention they have received."""
        return False

    @property
    def score_decay(self) -> float:
        """Factor on the scores at each decode step."""
        return 1.0

    def capacity(self, seen: int) -> int | None:
        """Slots at which overwriting begins when a prompt is complete, after ``seen`` tokens in all; None: nothing is
        ever overwritten, which is what a ratio means that keeps everything."""
        if self.ratio is not None and self.entries(seen) == seen:
            return None
        limit = self.entries(seen) if self.ratio is not None else self.entries(2**62)
        return limit + self.empty_slots

    def backends(self, problem: Problem) -> dict[str, tuple[str, str]]:
        """Operation -> (backend, reason) for the scores and decode steps of one model."""
        return {}

    def attend_and_choose(self, view: AttentionView, slots: StepView) -> tuple[Tensor, Tensor, Tensor] | None:
        """A decode step of a full cache in one operation: output [B, 1, Hq, Dv], scores with the attention of this
        step, and :meth:`victims` for them. None where attention is left to the model, and the rest follows it."""
        return None

    @abstractmethod
    def victims(self, view: StepView) -> Tensor:
        """The slot that the next token overwrites, int64 [B, kv_heads]."""
