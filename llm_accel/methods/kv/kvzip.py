"""KVzip: the entries stay that the model needs to repeat the context (arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llm_accel.methods.base import ENTRIES, MethodInfo, option
from llm_accel.methods.context import ContextCompression, Lead, PassView
from llm_accel.methods.kv.adakv import best_of_all, of_all_heads, slots_of_all_layers
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.selection import slots_of
from llm_accel.methods.shard import WHOLE

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_LOGITS, _LOGITS_CPU = 2**26, 2**19  # scored at a time


@dataclass(frozen=True)
class KVzip(ContextCompression):
    """Reads the context again and keeps the entries that this needs, whatever will be asked later: for contexts that
    are compressed once and asked often."""

    division: Literal["tokens", "global", "layer", "head"] = option(
        "who shares the budget by score: tokens, all layers, whose heads keep the same tokens, those that any of them "
        "needs; global, all layers and heads, as in the paper; layer, the heads of each layer; head, nobody",
        "tokens",
    )
    sinks: int = option("first tokens of the context, always kept", 4, most=ENTRIES, least=0)
    chunk: int = option("tokens of the context that are read again at a time", 2048, most=ENTRIES, least=1)
    prompt: Literal["auto", "text", "none"] | tuple[int, ...] = option(
        "what the model is told before it reads again: text, the paper's request in the chat template of the tokenizer "
        "that lies with the weights; auto, that if there is one; none; or token ids",
        "auto",
    )
    page: int = option(
        "entries per page of a row and head, where heads keep numbers of their own", 16, most=4096, least=1
    )

    name: ClassVar[str] = "kvzip"
    info: ClassVar[MethodInfo] = MethodInfo(
        "KVzip, arXiv 2505.23416", "KV cache after the prompt, each layer and head to its own size", needs_query=False
    )

    @property
    def reserved(self) -> int:
        return self.sinks

    @property
    def reserved_for(self) -> str:
        return f"{self.sinks} sinks are always kept and count"

    @property
    def pass_sinks(self) -> int:
        return self.sinks

    @property
    def page_size(self) -> int | None:
        return self.page if self.division in ("global", "layer") else None

    def parts(self, first: int, length: int) -> list[tuple[int, int]]:
        return [(start, min(start + self.chunk, length)) for start in range(first, length, self.chunk)]

    def validate(self) -> None:
        super().validate()
        if isinstance(self.prompt, tuple) and not (self.prompt and min(self.prompt) >= 0):
            self.fail("prompt", "'auto', 'text', 'none', or token ids of at least 0")

    @property
    def tokenizer_use(self) -> Literal["required", "optional", "none"]:
        return "required" if self.prompt == "text" else "optional" if self.prompt == "auto" else "none"

    def lead(self, tokenizer: Any = None) -> Lead:
        if isinstance(self.prompt, tuple):
            return Lead(first=self.prompt, later=self.prompt)
        if tokenizer is None:
            return Lead()
        head, opening = around_text(tokenizer)
        told = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (_FIRST, _LATER, opening, head)
        )
        first, later, behind, before = told
        return Lead(first, later, behind, head=before)

    def pass_score(self, view: PassView) -> Tensor:
        return repeat_scores(view, self.sinks)

    def always_keep(self, view: PromptView) -> Tensor:
        return view.cache_positions < self.sinks

    def select_all(self, views: Sequence[PromptView]) -> list[Tensor]:
        if self.division == "global":
            return self._best([self.order(view) for view in views], views)
        if self.division != "tokens":
            return super().select_all(views)
        orders = [view.heads.max(self.order(view).amax(1, keepdim=True)) for view in views]
        kept = self._best(orders, [replace(view, heads=WHOLE) for view in views])
        return [slots.expand(-1, view.kv_heads, -1) for slots, view in zip(kept, views, strict=True)]

    def _best(self, priorities: Sequence[Tensor], views: Sequence[PromptView]) -> list[Tensor]:
        """What stays where the layers share what they all have."""
        device = priorities[0].device
        totals = [self._total(priority, view).to(device) for priority, view in zip(priorities, views, strict=True)]
        total = torch.stack(totals).sum(0)
        return slots_of_all_layers(priorities, lambda every: best_of_all(every, total), views)

    def allocate(self, priority: Tensor, view: PromptView) -> Tensor:
        if self.division == "head":
            return super().allocate(priority, view)
        kept = best_of_all(of_all_heads(priority, view.heads), self._total(priority, view))
        return slots_of(view.heads.mine(kept)[..., -view.slots :])

    def _total(self, priority: Tensor, view: PromptView) -> Tensor:
        """Entries that all heads of a layer have together, int64 [B]."""
        return self.row_entries(view.lengths, view) * priority.shape[1] * view.heads.count


def around_text(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before the text of a user, and between it and the answer; nothing and a line break
    without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    user = [{"role": "user", "content": "<text>"}]
    whole: str = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    head, _, opening = whole.rpartition("<text>")
    return head, opening


def repeat_scores(view: PassView, sinks: int) -> Tensor:
    """How much a pass attends to each entry of its part at most: the largest probability over its queries and the query
    heads of a KV head, of a softmax that sees the first ``sinks`` entries, the part, and the keys of the pass up to the
    query's own; fp32 [B, kv_heads, last - first]."""
    query, key = view.query, view.key
    batch, query_heads, count, width = query.shape
    context, key_heads = key.shape[2] - count, key.shape[1]
    seen, before = [key[:, :, view.first : view.last]], 0
    if view.lse is None:  # the others count in the softmax alone
        before = min(sinks, view.first)
        seen = [key[:, :, :before], *seen, key[:, :, context:]]
    keys = torch.cat(seen, dim=2).float().transpose(2, 3)
    part = slice(before, before + view.last - view.first)
    most = torch.full((batch, view.kv_heads, view.last - view.first), float("-inf"), device=key.device)
    at_once = max(1, _logits_at_once(key.device) // (batch * query_heads * keys.shape[-1]))
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        rows = query[:, :, first:last].reshape(batch, key_heads, -1, width).float() * view.scaling
        logits = torch.matmul(rows, keys[..., : part.stop + last]).view(batch, query_heads, last - first, -1)
        if view.softcap is not None:
            logits = logits.div_(view.softcap).tanh_().mul_(view.softcap)
        if view.lse is None:
            later = torch.ones(last - first, last - first, dtype=torch.bool, device=key.device).triu(1)
            logits[..., part.stop + first :].masked_fill_(later, float("-inf"))
            total = logits.logsumexp(-1, keepdim=True)
        else:
            total = view.lse[:, :, first:last, None]
        if view.learned_sinks is not None:
            total = torch.logaddexp(total, view.learned_sinks.float()[:, None, None])
        found = logits[..., part].sub_(total).amax(2).view(batch, view.kv_heads, -1, most.shape[-1]).amax(2)
        most = torch.maximum(most, found)
    return most.exp_()


def _logits_at_once(device: torch.device) -> int:
    """How many logits are scored at once: as many as a core's cache holds, or as bound the memory of a GPU."""
    return _LOGITS_CPU if device.type == "cpu" else _LOGITS
