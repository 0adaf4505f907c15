"""KVzip: the entries stay that the model needs to repeat the context (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.methods.adakv import best_of_all, of_all_heads
from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.context import ContextCompression, Lead, PassView, slots_of_all_layers
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.selection import slots_of

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_QUERIES = 256  # scored at a time, so that memory stays bounded


@dataclass(frozen=True)
class KVzip(ContextCompression):
    """Reads the context again and keeps the entries that this needs, whatever will be asked later: for contexts that
    are compressed once and asked often."""

    division: Literal["global", "layer", "head"] = option(
        "who shares the budget by score: global, all layers and heads; layer, the heads of each layer; head, nobody",
        "global",
    )
    sinks: int = option("first tokens of the context, always kept", 4, most=ENTRIES, least=0)
    chunk: int = option("tokens of the context that are read again at a time", 2048, most=ENTRIES, least=1)
    prompt: Literal["none", "text"] | tuple[int, ...] = option(
        "what the model is told before it reads again: none; text, the paper's request, by the tokenizer that lies "
        "with the model's weights; or token ids",
        "none",
    )
    page: int = option("entries per page of the store, whose pages belong to one row and head", 16, most=4096, least=1)

    name: ClassVar[str] = "kvzip"
    info: ClassVar[MethodInfo] = MethodInfo(
        paper="KVzip, arXiv 2505.23416",
        cuts="KV cache after the prompt, each layer and head to its own size",
        needs_query=False,
        frees_memory=True,
    )

    @property
    def reserved(self) -> int:
        return self.sinks

    @property
    def reserved_for(self) -> str:
        return f"{self.sinks} sinks are always kept and count"

    @property
    def page_size(self) -> int | None:
        return None if self.division == "head" else self.page

    def parts(self, length: int) -> list[tuple[int, int]]:
        return [(first, min(first + self.chunk, length)) for first in range(0, length, self.chunk)]

    def validate(self) -> None:
        super().validate()
        if isinstance(self.prompt, tuple) and not (self.prompt and min(self.prompt) >= 0):
            self.fail("prompt", "'none', 'text', or token ids of at least 0")

    @property
    def needs_tokenizer(self) -> bool:
        return self.prompt == "text"

    def lead(self, tokenizer: Any = None) -> Lead:
        if isinstance(self.prompt, tuple):
            return Lead(first=self.prompt, later=self.prompt)
        if not self.needs_tokenizer:
            return Lead()
        first, later, behind = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (_FIRST, _LATER, answer_opening(tokenizer))
        )
        return Lead(first, later, behind)

    def pass_score(self, view: PassView) -> Tensor:
        return repeat_scores(view, self.sinks)

    def always_keep(self, view: PromptView) -> Tensor:
        return view.ranks < self.sinks

    def select_all(self, views: Sequence[PromptView]) -> list[Tensor]:
        if self.division != "global":
            return super().select_all(views)
        ranks = [self.order(view) for view in views]
        totals = sum(self._total(rank, view).to(ranks[0].device) for rank, view in zip(ranks, views, strict=True))
        assert isinstance(totals, Tensor)
        return slots_of_all_layers(ranks, totals, views)

    def share_out(self, rank: Tensor, view: PromptView) -> Tensor:
        if self.division == "head":
            return super().share_out(rank, view)
        kept = best_of_all(of_all_heads(rank, view.heads), self._total(rank, view))
        return slots_of(view.heads.mine(kept)[..., -view.slots :])

    def _total(self, rank: Tensor, view: PromptView) -> Tensor:
        """Entries that all heads of a layer have together, int64 [B]."""
        return self.row_entries(view.lengths, view) * rank.shape[1] * view.heads.count


def answer_opening(tokenizer: Any) -> str:
    """What the chat template puts between the text of a user and the answer; a line break without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    user = [{"role": "user", "content": "<text>"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    return whole.rpartition("<text>")[2]


def repeat_scores(view: PassView, sinks: int) -> Tensor:
    """How much a pass attends to each entry of its part at most: the largest probability over its queries and the query
    heads of a KV head, of a softmax that sees the first ``sinks`` entries, the part, and the keys of the pass up to the
    query's own; fp32 [B, kv_heads, last - first]."""
    query, key = view.query, view.key
    batch, query_heads, count, width = query.shape
    context, key_heads, before = key.shape[2] - count, key.shape[1], min(sinks, view.first)
    seen = [key[:, :, :before], key[:, :, view.first : view.last], key[:, :, context:]]
    keys = torch.cat(seen, dim=2).float().transpose(2, 3)
    part = slice(before, before + view.last - view.first)
    most = torch.zeros(batch, view.kv_heads, view.last - view.first, device=key.device)
    for first in range(0, count, _QUERIES):
        last = min(first + _QUERIES, count)
        rows = query[:, :, first:last].reshape(batch, key_heads, -1, width).float() * view.scaling
        logits = torch.matmul(rows, keys[..., : part.stop + last]).view(batch, query_heads, last - first, -1)
        if view.softcap is not None:
            logits = logits.div_(view.softcap).tanh_().mul_(view.softcap)
        later = torch.ones(last - first, last - first, dtype=torch.bool, device=key.device).triu(1)
        logits[..., part.stop + first :].masked_fill_(later, float("-inf"))
        peak = logits.amax(-1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(-1, keepdim=True)
        if view.learned_sinks is not None:
            total += (view.learned_sinks.float()[:, None, None] - peak).exp_()
        found = logits[..., part].div_(total).amax(2).view(batch, view.kv_heads, -1, most.shape[-1]).amax(2)
        most = torch.maximum(most, found)
    return most
