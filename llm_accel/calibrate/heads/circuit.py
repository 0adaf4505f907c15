"""Which single heads answering rests on, found by taking out one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_accel.api import apply
from llm_accel.methods import RetrievalHeads
from llm_accel.methods.kv.head_profile import Head
from llm_accel.patches.heads import model_heads

COST = 0.1  # nats per answer token from which a head belongs to the circuit


@torch.no_grad()
def find_circuit(
    model: Any,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    retrieval: Sequence[Head],
    tick: Callable[[], None] = lambda: None,
) -> list[Head]:
    """The heads in ``retrieval``, and every query head whose output, zeroed alone at every position, raises the loss of
    the right answer by at least ``COST``. One rule, stated before any control is drawn.

    Args:
        prompts: (prompt ids, answer ids) pairs.
        tick: called after each head.
    """
    heads = model_heads(model)
    intact = answer_loss(model, prompts)
    found = set(retrieval)
    for layer in range(heads.layers):
        for head in range(heads.query_heads):
            knockout = RetrievalHeads(mode="mask", phase="all", head_list=(f"{layer}.{head}",))
            with apply(model, knockout):
                if answer_loss(model, prompts) - intact >= COST:
                    found.add((layer, head))
            tick()
    return sorted(found)


@torch.no_grad()
def answer_loss(model: Any, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Mean negative log-probability of the answers, in nats per token."""
    total, count = 0.0, 0
    for prompt, answer in prompts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        targets = torch.tensor(answer, device=logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(answer)
    return total / max(1, count)
