"""Choice of the next token, each row of a batch by its own settings and its own random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen; the names are those of the API.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: the likeliest tokens that together reach this probability, in (0, 1].
        top_k: that many of the likeliest tokens; 0 and less for all.
        min_p: tokens stay that have at least this share of the likeliest token's probability.
        presence_penalty, frequency_penalty: taken off the logit of each generated token, once and for each time.
        repetition_penalty: divides the positive logits of tokens in prompt and answer, multiplies negative ones.
        logit_bias: token id -> what is added to its logit.
        stop_token_ids: tokens that end the answer, beside the model's own.
        ignore_eos: the model's own end tokens do not.
        min_tokens: so many tokens come before anything ends the answer.
        seed: the same seed gives the same random numbers, whatever else is in the batch; None for fresh ones.
        logprobs: how many alternatives to report for each token; None to report no probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None

    def source(self, index: int) -> random.Random:
        """The random numbers of answer number ``index``."""
        return random.SystemRandom() if self.seed is None else random.Random(f"{self.seed}/{index}")

    def adjusted(self, logits: Tensor, prompt: Sequence[int], tokens: Sequence[int], ends: Collection[int]) -> Tensor:
        """Logits after penalties, bias and minimum length, in the order of vLLM.

        Args:
            logits: float [V], after the prompt and so many ``tokens`` of the answer; stays as it is.
            ends: the tokens that end the answer.
        """
        if not self.adjusts:
            return logits
        logits = logits.float().clone()
        if len(tokens) < self.min_tokens:
            logits[_ids([token for token in ends if token < len(logits)], logits)] = -torch.inf
        if self.logit_bias:
            logits[_ids(self.logit_bias, logits)] += logits.new_tensor(list(self.logit_bias.values()))
        if self.repetition_penalty != 1:
            seen = _ids({*prompt, *tokens}, logits)
            chosen = logits[seen]
            logits[seen] = torch.where(chosen > 0, chosen / self.repetition_penalty, chosen * self.repetition_penalty)
        said, times = _ids(tokens, logits).unique(return_counts=True)
        logits[said] -= self.presence_penalty + self.frequency_penalty * times
        return logits

    @property
    def cuts(self) -> tuple[float, float, float, float]:
        """Temperature, and what bounds the tokens in question: top-p, top-k (infinity for all) and min-p."""
        return self.temperature, self.top_p, self.top_k if self.top_k > 0 else math.inf, self.min_p

    @property
    def adjusts(self) -> bool:
        """Whether :meth:`adjusted` may change anything."""
        penalised = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return penalised or bool(self.logit_bias) or self.min_tokens > 0


def _ids(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)


def choose(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The next token of each row, int64 [B].

    Args:
        logits: float [B, V].
        settings: one for each row.
        draws: one number in [0, 1) for each row, unused by greedy rows. The token is where the cumulative distribution
            of the tokens in question, likeliest first, passes it.
    """
    tokens = logits.argmax(-1)
    rows = [row for row, setting in enumerate(settings) if setting.temperature > 0]
    if not rows:
        return tokens
    device = logits.device
    numbers = [(*settings[row].cuts, draws[row]) for row in rows]
    column = torch.tensor(numbers, dtype=torch.float64, device=device)
    temperature, top_p, top_k, min_p, draw = column[:, :, None].unbind(1)
    behind = logits[rows].double() - logits[rows].amax(-1, keepdim=True)  # no temperature makes infinities of 0
    scaled, order = (behind / temperature).sort(dim=-1, descending=True, stable=True)
    likely = scaled.softmax(-1)
    before = likely.cumsum(-1) - likely
    rank = torch.arange(likely.shape[-1], device=device)
    inside = (before < top_p) & (rank < top_k) & (likely >= min_p * likely[:, :1])
    inside[:, 0] = True
    reached = (likely * inside).cumsum(-1)
    place = torch.searchsorted(reached, draw * reached[:, -1:], right=True)
    place = place.minimum(inside.sum(-1, keepdim=True) - 1)
    tokens[rows] = order.gather(-1, place)[:, 0]
    return tokens
