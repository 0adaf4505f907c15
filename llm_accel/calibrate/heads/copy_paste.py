"""The copy-paste detector: which heads attend to the needle token that the model generates at the same step
(Retrieval Head, arXiv 2404.15574)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llm_accel.errors import ConfigError
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.probe import Observed, observe_attention

MAX_STEPS = 50


@dataclass(frozen=True)
class Copies:
    """One answered prompt."""

    answer: tuple[int, ...]  # generated ids
    size: int  # needle tokens that hold the answer
    hits: dict[tuple[int, int, int], int]  # (layer, query head, needle position) -> how often it copied


class _MostAttended:
    """The position that each query head of each layer attends to most, in the running decode step."""

    def __init__(self) -> None:
        self.active = False
        self.best: dict[int, Tensor] = {}

    def __call__(self, seen: Observed) -> None:
        if not self.active or seen.sliding_window is not None:
            return  # a sliding layer forgets positions, and has nothing to compress
        group = seen.query.shape[1] // seen.key.shape[1]
        rows = seen.query[0, :, -1].view(seen.key.shape[1], group, -1).float()
        logits = torch.einsum("hgd,hsd->hgs", rows, seen.key[0].float())  # scale, soft cap and sinks keep the order
        self.best[seen.layer] = logits.argmax(-1).flatten()


@torch.no_grad()
def find_copies(
    model: Any, ids: Sequence[int], spans: Iterable[tuple[int, int]], steps: int, ends: Iterable[int] = ()
) -> Copies:
    """Greedy decoding of one prompt: which head attends to which token of the needle while that token is generated.

    Args:
        ids: prompt tokens.
        spans: [first, past-the-end) positions of the answer in the prompt.
        steps: tokens generated at most.
        ends: tokens that end the answer.
    """
    wanted = {position for first, last in spans for position in range(first, last)}
    stop, recorder = set(ends), _MostAttended()
    hits: dict[tuple[int, int, int], int] = {}
    answer: list[int] = []
    prompt = torch.tensor([list(ids)], device=model.device)
    with observe_attention(model, recorder):
        given: dict[str, Any] = {CACHE: DynamicCache(config=model.config), "use_cache": True}
        if prompt.shape[1] > 1:
            model.get_decoder()(prompt[:, :-1], **given)
        recorder.active, token = True, prompt[:, -1:]
        for _ in range(min(steps, MAX_STEPS)):
            token = model(token, **given).logits[:, -1:].argmax(-1)
            written = int(token)
            if written in stop:
                break
            answer.append(written)
            for layer, places in recorder.best.items():
                for head, place in enumerate(places.tolist()):
                    if place in wanted and ids[place] == written:
                        hits[layer, head, place] = hits.get((layer, head, place), 0) + 1
    return Copies(tuple(answer), len(wanted), hits)


def mean_share(successes: Sequence[Copies], layers: int, heads: int, compat: bool = False) -> Tensor:
    """Query-head scores fp64 [L, Hq]: the mean over answered prompts of the share of needle tokens that a head copied.

    Args:
        compat: count a token as often as it was copied, as the published scores do, which may exceed 1.
    """
    total = torch.zeros(layers, heads, dtype=torch.float64)
    for one in successes:
        for (layer, head, _), count in one.hits.items():
            total[layer, head] += (count if compat else 1) / one.size
    return total / max(1, len(successes))


def value_span(decode: Callable[[Sequence[int]], str], ids: Sequence[int], first: int, value: str) -> tuple[int, int]:
    """[first, past-the-end) positions of the tokens that spell ``value``, in a needle that begins at ``first``. Found
    on the ids themselves, so that it works for any tokenizer and chat template.

    Raises:
        ConfigError: the tokens do not spell it.
    """
    for last in range(first + 1, min(len(ids), first + 400) + 1):
        if value in decode(ids[first:last]):
            begin = last - 1
            while value not in decode(ids[begin:last]):
                begin -= 1
            return begin, last
    raise ConfigError(f"the tokens of this prompt do not spell the value {value!r}; use --value-kind number or word.")
