"""H2O: the worked example, the laws of the choice, and the scores that it ranks by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import llm_accel
from llm_accel import H2O, ConfigError
from llm_accel.methods import PromptView, StepView
from tests.contracts.plain_attention import running
from tests.methods.views import Problem, check_laws, kept_sets, problems, view_of
from tests.tiny import left_padded, prompt, tiny_model

RELATIVE = 1e-4


def scored(scores: list[float]) -> PromptView:
    """One row and head whose entries have received this much attention."""
    key = torch.zeros(1, 1, len(scores), 4)
    view = PromptView(key[:, :, :0], key, 1, scaling=1.0, layer=0, layers=1)
    return replace(view, scores=torch.tensor(scores)[None, None])


EXAMPLE = [2.25, 0.875, 0.75, 0.125]  # column sums of [1], [.75 .25], [.25 .5 .25], [.25 .125 .5 .125]


def test_the_worked_example() -> None:
    assert kept_sets(H2O(heavy=2, recent=1, sinks=0).select(scored(EXAMPLE))) == [[{0, 1, 3}]]
    assert kept_sets(H2O(heavy=2, recent=1, sinks=0, norm="mean").select(scored(EXAMPLE))) == [[{0, 2, 3}]]


def test_the_simulation_shows_one_entry_fewer_and_holds_the_leaving_one_back() -> None:
    # the next token is recent; entry 3 leaves the window and is no candidate yet, however high its score
    config = H2O(heavy=2, recent=1, sinks=0, semantics="sim")
    assert kept_sets(config.select(scored([2.25, 0.875, 0.75, 9.0]))) == [[{0, 1}]]
    assert kept_sets(config.select(scored([2.25, 0.875, 0.75, 9.0, 0.1]))) == [[{0, 3}]]


def test_ties_keep_the_oldest() -> None:
    assert kept_sets(H2O(heavy=2, recent=1, sinks=0).select(scored([0.5, 1.0, 1.0, 1.0, 1.0]))) == [[{1, 2, 4}]]


def test_sinks_that_take_more_than_half_of_the_budget_leave_less_to_recent_entries() -> None:
    config = H2O(budget=5, sinks=4)
    assert kept_sets(config.select(scored([1.0] * 9))) == [[{0, 1, 2, 3, 8}]]
    held = StepView(torch.tensor([[[0, 1, 2, 3, 7, 8]]]), torch.full((1, 1, 6), 1.0))
    assert config.victims(held).tolist() == [[4]]


def with_scores(problem: Problem) -> PromptView:
    """A random prompt with random scores, zeros and ties among them."""
    view = view_of(problem)
    generator = torch.Generator().manual_seed(problem.seed + 1)
    scores = torch.rand(view.key.shape[0], view.kv_heads, view.slots, generator=generator)
    return replace(view, scores=(scores * 8).floor() / 4)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems(protect=False))
def test_the_laws_of_every_choice(problem: Problem) -> None:
    config = H2O(budget=problem.budget, sinks=0)
    check_laws(config, with_scores(problem), always=problem.budget // 2)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems(protect=False))
def test_the_lowest_score_leaves_and_sinks_and_recent_entries_do_not(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(problem.seed)
    config = H2O(heavy=problem.window + 1, recent=problem.budget, sinks=1)
    slots = problem.window + 1 + problem.budget + 1
    positions = torch.stack([torch.randperm(slots, generator=generator) for _ in range(problem.kv_heads)])[None]
    scores = (torch.rand(positions.shape, generator=generator) * 4).floor()
    victims = config.victims(StepView(positions, scores))
    for head in range(problem.kv_heads):
        candidates = [
            (float(scores[0, head, slot]), position)
            for slot, position in enumerate(positions[0, head].tolist())
            if 1 <= position < slots - problem.budget
        ]
        assert positions[0, head, victims[0, head]] == min(candidates)[1]


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_scores_of_the_prompt_are_dense_column_sums(family: str, chunk: int | None, padded: bool) -> None:
    """Softcap, scale and learned sinks are the model's own; 2 query heads share a KV head; rows are padded."""
    model, lengths = tiny_model(family), (45, 31, 9) if padded else (45,)
    ids, mask = left_padded(list(lengths)) if padded else (prompt(45), torch.ones(1, 45, dtype=torch.long))
    with llm_accel.apply(model, H2O(budget=200)) as handle:
        cache = handle.new_cache()
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, prefill_chunk_size=chunk, do_sample=False
        )
        acting = [layer.layer for layer in handle.report().layers if layer.skipped_reason is None]
    sums = column_sums(model, ids, mask)
    for layer in acting:
        scores = cache.layers[layer].scores.double()
        assert scores.shape == sums[layer].shape
        assert ((scores - sums[layer]).abs() <= RELATIVE * sums[layer]).all()
        if family != "gpt_oss":  # learned sinks take a share of each query
            total = torch.tensor(lengths, dtype=torch.float64)[:, None] * 2
            assert torch.allclose(scores.sum(-1), total.expand(-1, 2), rtol=1e-5)


def column_sums(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> dict[int, Tensor]:
    """Layer -> attention that real queries pay to each column in the dense model, float64 [B, Hk, n]."""
    sums: dict[int, Tensor] = {}

    def record(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: object
    ) -> tuple[Tensor, None]:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        logits = query.double() @ key.double().repeat_interleave(group, 1).transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        logits = logits.masked_fill(attention_mask < 0, float("-inf"))
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., : key.shape[2]].nan_to_num() * mask[:, None, :, None]
        sums[module.layer_idx] = weights.sum(2).view(len(ids), heads, group, -1).sum(2)
        output = weights.float() @ value.repeat_interleave(group, 1)
        return output.transpose(1, 2).contiguous(), None

    with torch.no_grad(), running(model, record):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return sums


def test_scores_never_shrink_while_decoding_and_the_newest_has_its_own() -> None:
    model, ids = tiny_model("llama"), prompt(40)
    with torch.no_grad(), llm_accel.apply(model, H2O(budget=24, sinks=0)) as handle:
        cache = handle.new_cache()
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        layer = cache.layers[0]
        for _ in range(20):
            spare, before = layer.spare, layer.scores.clone()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            assert (layer.scores >= before.scatter(2, spare[..., None], 0.0)).all()
            assert (layer.scores.gather(2, spare[..., None]) > 0).all()


def test_budget_heavy_and_recent_settle_each_other() -> None:
    assert H2O(heavy=3, recent=2, sinks=0).budget == 5
    assert H2O(budget=9, heavy=3, sinks=0).recent == 6
    with pytest.raises(ConfigError, match="give two of the three"):
        H2O(heavy=3, recent=2, budget=9, sinks=0)
    with pytest.raises(ConfigError, match="give budget instead of ratio"):
        H2O(heavy=3, ratio=0.5)
    with pytest.raises(ConfigError, match="decay=0"):
        H2O(decay=0.0)
