"""One prompt under many settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.defaults.prompts import Case
from benchmarks.defaults.replay import OBSERVED, Replay
from llm_accel.common.generation import end_tokens
from llm_accel.methods.kv.division import Division
from llm_accel.methods.kv.snapkv import SnapKV
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import PromptCompression
from llm_accel.methods.selection import total_order

_MARGIN = 16  # tokens of a dense answer around its value
_TOKENS = 768  # read at once


class Prober:
    """A model and its tokenizer, asked about cases under settings."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.replay, self.tokenizer = Replay(model), tokenizer
        self.ends = end_tokens(model, tokenizer)

    def dense_answer(self, case: Case) -> list[int] | None:
        """Tokens of the dense answer up to the one behind the value; None where it lacks the value."""

        def done(tokens: list[int]) -> bool:
            return case.value in self.text(tokens[:-1]) or tokens[-1] in self.ends

        most = len(self.tokenizer.encode(case.value, add_special_tokens=False)) + _MARGIN
        tokens = self.replay.answer(self.replay.read(case.ids), most, done)
        return tokens if case.value in self.text(tokens[:-1]) and not self.goes_on(tokens[-1]) else None

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def goes_on(self, token: int) -> bool:
        """Whether a token goes on with the word or number before it."""
        return self.text([token])[:1].isalnum()

    def verdicts(self, answer: Sequence[int], settings: Sequence[PromptCompression]) -> list[bool]:
        """For each setting whether the model still gives the dense answer."""
        masks = Masks(self.replay)
        found: list[bool] = []
        step = max(1, _TOKENS // len(answer))
        for first in range(0, len(settings), step):
            some = settings[first : first + step]
            seen = masks.of(some)
            for row in self.replay.next_tokens(answer[:-1], seen):
                found.append(row[:-1] == list(answer[1:-1]) and not self.goes_on(row[-1]))
        return found


class Masks:
    """What settings keep of the prompt that has been read; votes and orders that settings share are computed once."""

    def __init__(self, replay: Replay) -> None:
        self.length, self.views = replay.length, replay.views
        self._votes: dict[tuple[Any, ...], Tensor] = {}
        self._ranks: dict[tuple[Any, ...], Tensor] = {}

    def of(self, settings: Sequence[PromptCompression]) -> dict[int, Tensor]:
        """For each layer bool [settings, Hk, n]."""
        layers: dict[int, list[Tensor]] = {}
        for setting in settings:
            for index, kept in self._kept(setting):
                layers.setdefault(index, []).append(kept)
        return {index: torch.cat(masks) for index, masks in layers.items()}

    def _kept(self, setting: PromptCompression) -> Iterator[tuple[int, Tensor]]:
        for index, view in self.views(min(max(setting.observed_queries, 1), OBSERVED)).items():
            slots = setting.allocate(self._rank(setting, view), view)
            mask = torch.zeros(*slots.shape[:2], self.length + 1, dtype=torch.bool)
            yield index, mask.scatter_(2, slots.where(slots >= 0, self.length), True)[..., : self.length]

    def _rank(self, setting: PromptCompression, view: PromptView) -> Tensor:
        base = setting.score_method if isinstance(setting, Division) else setting
        if not isinstance(base, SnapKV):
            score, tie = base.score_and_tie_break(view)
            return total_order(score, view.valid, base.always_keep(view), tie)
        key = (view.layer, base.window, base.voters, base.gqa)
        if key not in self._votes:
            self._votes[key] = base.raw_votes(view)
        raw = self._votes[key]
        whole = (*key, base.kernel, base.pool, base.carries and base.entries(self.length))
        if whole not in self._ranks:
            inside = view.valid[:, None, : raw.shape[-1]]
            score, tie = base.scores_of(base.pooled(raw, inside, view), raw)
            self._ranks[whole] = total_order(score, view.valid, base.always_keep(view), tie)
        return self._ranks[whole]
