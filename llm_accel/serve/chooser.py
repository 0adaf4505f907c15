"""The next token of each row: the model's own rules, what the request wants, and the token handed to its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_accel.patches.forward import Forward
from llm_accel.serve.logprobs import token_logprobs
from llm_accel.serve.sampling import choose
from llm_accel.serve.sequences import TokenSequence

Scores = Callable[[Any, Any], Tensor]


class Chooser:
    """Chooses tokens for a model; ``ends``: its own end tokens."""

    def __init__(self, forward: Forward, ends: set[int]) -> None:
        self._forward, self._ends = forward, ends

    @torch.no_grad()
    def choose(self, rows: Sequence[TokenSequence], logits: Tensor, contrast: Scores | None = None) -> None:
        """Gives each row its next token, by its logits, fp32 [B, V]; ``contrast``: of a method that changes logits."""
        scores = self._ruled(rows, logits)
        if contrast is not None:
            scores = contrast(None, scores)
        draws = [row.draw() if row.job.sampling.temperature > 0 and not row.over else 0.0 for row in rows]
        tokens = choose(self._adjusted(rows, scores), [row.job.sampling for row in rows], draws)
        for number, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            top, logprob = row.job.sampling.logprobs, None
            if top is not None and not row.over:
                [logprob] = token_logprobs(scores[number, None], tokens[number, None], top)
            row.accept(token, self._ends, logprob)

    def _ruled(self, rows: Sequence[TokenSequence], logits: Tensor) -> Tensor:
        for number, row in enumerate(rows):
            if row.rules is None:
                row.rules = self._forward.rules(len(row.prompt))
            if row.rules:
                ids = torch.tensor([[*row.prompt, *row.tokens]], device=logits.device)
                logits[number] = row.rules(ids, logits[number, None])[0]  # type: ignore[arg-type]
        return logits

    def _adjusted(self, rows: Sequence[TokenSequence], scores: Tensor) -> Tensor:
        if not any(row.job.sampling.adjusts for row in rows):
            return scores
        return torch.stack(
            [
                row.job.sampling.adjusted(own, row.prompt, row.tokens, self._ends) if row.job.sampling.adjusts else own
                for row, own in zip(rows, scores, strict=True)
            ]
        )
