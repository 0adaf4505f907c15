"""The log-sum-exp that attention computes anyhow, and what it saves H2O: the second pass over the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llm_accel
from llm_accel.kernels.column_votes import reference
from llm_accel.patches import eviction
from llm_accel.patches.attention_lse import with_lse
from tests.tiny import left_padded, tiny_model


def problem(queries: int, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the mask of the newest queries."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, count, 16, generator=generator) for count in (queries, slots, slots))
    return query, key, value, torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("queries", "causal"), [(40, True), (40, False), (9, False)], ids=["causal", "mask", "chunk"])
def test_it_is_that_of_the_logits(queries: int, causal: bool, inference: bool) -> None:
    query, key, value, mask = problem(queries, 40)
    with torch.inference_mode(inference):
        given: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": mask}
        output, lse = with_lse(lambda: F.scaled_dot_product_attention(query, key, value, **given), query)
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, **given))
    logits = (query.double() @ key.double().transpose(2, 3)) / 4
    assert lse is not None
    assert (lse - logits.masked_fill(~mask, -torch.inf).logsumexp(-1)).abs().max() < 1e-5


def test_where_attention_has_none_there_is_none() -> None:
    query, key, value, _ = problem(12, 12)
    with sdpa_kernel(SDPBackend.MATH):
        assert with_lse(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), query)[1] is None

    def twice() -> Tensor:
        halves = [F.scaled_dot_product_attention(*(part[:1] for part in (query, key, value))) for _ in range(2)]
        return torch.cat(halves)

    assert with_lse(twice, query)[1] is None
    assert with_lse(lambda: F.scaled_dot_product_attention(query[:, :2], key[:, :2], value[:, :2]), query)[1] is None


@pytest.mark.parametrize("lengths", [[70], [70, 41]], ids=["one_row", "padded"])
def test_h2o_scores_a_prompt_in_one_pass(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores, and the same logits to the bit, as with a pass of its own."""
    model = tiny_model("llama")
    ids, mask = left_padded(lengths)

    def run() -> tuple[Tensor, list[Tensor]]:
        with llm_accel.apply(model, "h2o", budget=24) as handle, torch.no_grad():
            cache = handle.new_cache()
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        return logits, [layer.scores for layer in cache.layers]

    with monkeypatch.context() as patch:
        patch.setattr(reference, "row_logsumexp", lambda *_: pytest.fail("a second pass"))
        logits, scores = run()
    monkeypatch.setattr(eviction, "with_lse", lambda attention, query: (attention(), None))
    other, expected = run()
    assert torch.equal(logits, other)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(scores, expected, strict=True))


def test_a_soft_cap_or_sinks_take_the_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "with_lse", lambda *_: pytest.fail("kernels of SDPA know of no soft cap"))
    model = tiny_model("gemma2")
    with llm_accel.apply(model, "h2o", budget=24) as handle, torch.no_grad():
        model(torch.arange(70)[None] % 50, past_key_values=handle.new_cache())
