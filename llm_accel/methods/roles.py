"""The roles a method can play. The patches know these roles and never a method by name."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels.dispatch import Problem
from llm_accel.methods.attend import AttentionView
from llm_accel.methods.base import ENTRIES, LAYERS, MethodConfig, option
from llm_accel.methods.budget import Budgeted
from llm_accel.methods.shard import WHOLE, HeadShard


@dataclass(frozen=True)
class Depth:
    """Where a layer stands among those that a method acts on.

    Attributes:
        rank: its position, 0 for the first.
        layers: how many there are; layers without a full cache and skipped ones do not count.
        later: whether the layer has evicted before, so that its entries are fewer than the tokens it has seen.
    """

    rank: int = 0
    layers: int = 1
    later: bool = False


@dataclass(frozen=True)
class WholeCache(MethodConfig):
    """Role: every entry stays. What such a method decides is how large the buffers of a compiled decode are."""

    capacity: int | None = option(
        "tokens of prompt and answer that compiled decoding has place for: all calls up to it share one graph; None, "
        "and longer calls: as many as needed, in buckets",
        None,
        most=ENTRIES,
    )

    def validate(self) -> None:
        if self.capacity is not None and self.capacity < 1:
            self.fail("capacity", "an integer of at least 1, or None")


@dataclass(frozen=True)
class PromptView:
    """What a method sees of one layer once the prompt is complete. Slots are right-aligned: row ``b`` holds real
    entries in ``[start[b], S)``, oldest first; everything left of ``start[b]`` is padding.

    Attributes:
        query: the last observed queries, post-RoPE, [B, Hq, W, D]; row ``i`` belongs to slot ``S - W + i``.
        key: all keys as attention sees them, post-RoPE, [B, H, S, D]; H is Hk, or Hq where the model expands latents.
        kv_heads: heads that the cache stores and that decide on their own (1 for latent caches).
        start: first real slot of each row, int64 [B]; None when no row is padded. [B, kv_heads] where earlier
            evictions left the heads of a row with different numbers of entries.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        sinks: learned sink logits per query head [Hq], or None.
        layer: index of the layer.
        layers: number of layers of the model.
        protected: slots that must stay, bool [B, S], or None.
        scores: attention that each entry has received so far, fp32 [B, kv_heads, S], for methods that ask for it.
        depth: where the layer stands among those that the method acts on.
        slack: entries above its budget from which on a row is cut; rows with fewer keep all they have.
        seen: tokens that each row has seen, int64 [B or 1]; None where none of them was evicted before.
        entries: entries that each row may keep, int64 [B], where the prompt has fixed that; None: the method's own.
        heads: what the heads here say to those in other processes, and hear from them.
    """

    query: Tensor
    key: Tensor
    kv_heads: int
    start: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    layer: int
    layers: int
    protected: Tensor | None = None
    scores: Tensor | None = None
    depth: Depth = Depth()
    slack: int = 1
    seen: Tensor | None = None
    entries: Tensor | None = None
    heads: HeadShard = WHOLE

    @property
    def slots(self) -> int:
        """Stored slots S, padding included."""
        return self.key.shape[2]

    @property
    def lengths(self) -> Tensor:
        """Real entries of each row, int64 [B]; [B, kv_heads] where heads differ."""
        if self.start is None:
            return torch.full(self.key.shape[:1], self.slots, device=self.key.device)
        return self.slots - self.start

    @property
    def ranks(self) -> Tensor:
        """Rank of each slot among the real ones of its row, int64 [B or 1, S], below 0 for padding; [B, kv_heads, S]
        where heads differ. It is the original position until something is evicted."""
        index = torch.arange(self.slots, device=self.key.device)
        return index[None] if self.start is None else index - self.start[..., None]


@dataclass(frozen=True)
class ScoreAndKeep(Budgeted):
    """Role: decides, once the prompt is complete, which KV entries stay (per row, KV head and layer)."""

    skip_layers: tuple[int, ...] = option("layers that stay dense, for example 0+1", (), most=LAYERS)

    def validate(self) -> None:
        super().validate()
        if len(set(self.skip_layers)) != len(self.skip_layers) or any(index < 0 for index in self.skip_layers):
            self.fail("skip_layers", "distinct layer indices counted from 0")

    @property
    def deferred(self) -> bool:
        """Whether eviction waits for the first decode step."""
        return False

    @property
    def recompresses(self) -> bool:
        """Whether later turns cut the cache back to the budget."""
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

    @abstractmethod
    def select(self, view: PromptView) -> Tensor:
        """Slots to keep: int64 [B, kv_heads, n], ascending; -1 first where a row or head keeps fewer than n. Asked
        only when some row keeps fewer entries than it has."""


@dataclass(frozen=True)
class PromptCompression(ScoreAndKeep):
    """Role: compresses the prompt once; what is decoded afterwards is appended whole."""

    compress: Literal["eager", "deferred"] = option(
        "eager: inside each layer at the end of the prompt; deferred: before the first decode step", "eager"
    )
    multi_turn: Literal["append", "recompress"] = option(
        "append: later turns are added whole; recompress: each later turn cuts the cache back to the budget, or to "
        "ratio of all tokens seen so far",
        "append",
    )
    recompress_every: int | None = option(
        "cut back to the budget after each turn, and while decoding whenever this many entries were added; None: never",
        None,
        most=ENTRIES,
    )

    def validate(self) -> None:
        super().validate()
        if self.recompress_every is None:
            return
        if self.recompress_every < 1:
            self.fail("recompress_every", "an integer of at least 1, or None")
        if self.ratio is not None:
            raise ConfigError(
                f"{self.name}: recompress_every={self.recompress_every} caps a cache whose prompt is not known; "
                f"give budget instead of ratio={self.ratio}."
            )

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
    def recompresses(self) -> bool:
        return True

    @property
    def relative_positions(self) -> bool:
        """Whether positions are ranks in the cache; all heads of such a method keep the same entries."""
        return False

    @property
    def hides(self) -> bool:
        """Whether entries are only hidden from later tokens and all stay stored: a simulation that frees no memory.
        Such a method is asked to ``select`` what the next token sees beside itself, after each step."""
        return False

    @property
    def vacancies(self) -> int:
        """Slots beyond the budget: 1 where the new token is seen beside a full budget and evicts afterwards."""
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
        return limit + self.vacancies

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
