"""Which single heads answers depend on, found by ablating one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from llm_accel.api import apply
from llm_accel.common.progress import iterate
from llm_accel.methods import RetrievalHeads
from llm_accel.methods.kv.head_profile import Head
from llm_accel.patches.heads import model_heads

COST = 0.1  # nats per answer token from which a head belongs to the circuit

Answered = tuple[Sequence[int], Sequence[int]]  # ids of a prompt, and of its answer


@torch.no_grad()
def find_circuit(model: Any, prompts: Sequence[Answered], retrieval: Sequence[Head]) -> list[Head]:
    """The heads in ``retrieval``, and every query head whose output, zeroed alone at every position, raises the loss of
    the right answer by at least ``COST``."""
    heads = model_heads(model)
    intact = answer_loss(model, prompts)
    found = set(retrieval)
    for layer, head in iterate(list(product(range(heads.layers), range(heads.query_heads))), "head"):
        with apply(model, RetrievalHeads(mode="mask", phase="all", head_list=(f"{layer}.{head}",))):
            if answer_loss(model, prompts) - intact >= COST:
                found.add((layer, head))
    return sorted(found)


@torch.no_grad()
def answer_loss(model: Any, prompts: Sequence[Answered]) -> float:
    """Mean negative log-probability of the answers, in nats per token."""
    total, count = 0.0, 0
    for prompt, answer in prompts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        targets = torch.tensor(answer, device=logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(answer)
    return total / max(1, count)
