"""The data-free detector: random tokens repeated four times, and how much attention goes back to the same token (echo)
and to the one after it (induction) in earlier segments (RazorAttention, arXiv 2407.15891)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_accel.common.progress import iterate
from llm_accel.errors import ConfigError
from llm_accel.kernels.pair_probabilities import pair_probabilities
from llm_accel.patches.heads import model_heads
from llm_accel.patches.probe import Observed, observe_attention

SEGMENTS = 4


@dataclass(frozen=True)
class Repetition:
    """One input."""

    ids: Tensor  # [1, lead + 4 * tokens]
    lead: int  # tokens before the first segment (the begin-of-text token, or none)
    tokens: int  # T, tokens of a segment

    def columns(self) -> tuple[Tensor, Tensor]:
        """Same-token and next-token slots of the rows after the first segment, int64 [3 T, 3] each, -1 for none."""
        rows = torch.arange(self.tokens, SEGMENTS * self.tokens)
        back = torch.arange(1, SEGMENTS) * self.tokens
        same = rows[:, None] - back
        return (
            (same + self.lead).masked_fill(same < 0, -1),
            (same + self.lead + 1).masked_fill(same < 0, -1),
        )


def make_repetition(model: Any, tokenizer: Any, tokens: int, seed: int) -> Repetition:
    """Ordinary tokens in random order, no two alike where the vocabulary is large enough, four times over."""
    size = int(model.get_input_embeddings().num_embeddings)
    special = set(getattr(tokenizer, "all_special_ids", []) or [])
    pool = torch.tensor([index for index in range(min(size, len(tokenizer))) if index not in special])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(pool), generator=generator)
    if tokens > len(pool):
        picks = torch.randint(len(pool), (tokens,), generator=generator)
    segment = pool[picks[:tokens]]
    begin = getattr(tokenizer, "bos_token_id", None)
    lead = [] if begin is None else [int(begin)]
    ids = torch.cat([torch.tensor(lead, dtype=torch.long), segment.repeat(SEGMENTS)])[None]
    return Repetition(ids.to(model.device), len(lead), tokens)


@torch.no_grad()
def induction_scores(model: Any, tokenizer: Any, tokens: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Induction and echo scores of every query head, fp64 [L, Hq] each, in [0, 1]: the mean over the rows of all
    repetitions of the attention on the matching tokens of all earlier segments.

    Layers with a sliding window get 0: they hold no full KV cache that a head could keep.

    Args:
        tokens: T; the model reads 4 T at once.

    Raises:
        ConfigError: 4 T is longer than the model's positions.
    """
    heads = model_heads(model)
    limit = getattr(model.get_decoder().config, "max_position_embeddings", None)
    if tokens < 2 or (limit is not None and SEGMENTS * tokens + 1 > limit):
        most = "" if limit is None else f" to {(limit - 1) // SEGMENTS}, a quarter of the model's positions"
        raise ConfigError(f"--tokens {tokens} is not allowed; give 2{most}.")
    induction, echo = (torch.zeros(heads.layers, heads.query_heads, dtype=torch.float64) for _ in range(2))
    for sample in iterate(range(samples), "sample"):
        repetition = make_repetition(model, tokenizer, tokens, seed * 1000 + sample)
        same, after = (columns.to(model.device) for columns in repetition.columns())

        def accumulate(seen: Observed, same: Tensor = same, after: Tensor = after) -> None:
            if seen.sliding_window is None:
                both = pair_probabilities(
                    seen.query[:, :, -len(same) :],
                    seen.key,
                    torch.cat([same, after], dim=1),
                    scaling=seen.scaling,
                    softcap=seen.softcap,
                    sinks=seen.sinks,
                )[0]
                width = same.shape[1]
                echo[seen.layer] += both[..., :width].sum(-1).double().mean(-1).cpu()
                induction[seen.layer] += both[..., width:].sum(-1).double().mean(-1).cpu()

        with observe_attention(model, accumulate):
            model.get_decoder()(repetition.ids, use_cache=False)
    return induction / samples, echo / samples
