"""Arithmetic of blocks, the notes of a worker about its requests, and pages of each layout. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from llm_accel import ConfigError
from llm_accel.integrations.vllm.blocks import policy_of
from llm_accel.integrations.vllm.pages import SplitPages, VecPages
from llm_accel.integrations.vllm.steps import ObservedRows, Requests, shorter


@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 100, 127, 128, 320, 1000])
@pytest.mark.parametrize("method", ["snapkv:budget=100", "snapkv:ratio=0.25", "random:budget=64,window=3"])
def test_a_prompt_is_cut_to_whole_blocks_within_its_budget(method, prompt):
    policy = policy_of(method, 32)
    first, last = policy.gap(prompt, prompt + 5)
    assert 0 <= first <= last == prompt // 32
    kept = prompt - (last - first) * 32
    if first < last:
        rounded = policy.rounded(prompt)
        assert rounded.entries(prompt) == kept >= rounded.least
        wanted = policy.method.entries(prompt)
        assert kept <= max(wanted, policy.method.least + 31) and kept > wanted - 32


@pytest.mark.parametrize(
    ("method", "least"), [("snapkv:budget=64", 65), ("random:budget=40,window=16", 49), ("streaming_llm:budget=95", 96)]
)
def test_budgets_too_small_for_whole_blocks_are_refused(method, least):
    with pytest.raises(ConfigError, match=f"at least {least}"):
        policy_of(method, 32)
    name, _, options = method.partition("budget=")
    assert policy_of(f"{name}budget={least},{options.partition(',')[2]}".rstrip(","), 32)


@pytest.mark.parametrize("prompt", [1, 64, 100, 101, 128, 300, 352])
@pytest.mark.parametrize("every", [32, 64, 70])
def test_cuts_while_decoding_come_after_whole_blocks_and_leave_as_much_each_time(prompt, every):
    """As transformers cuts with the rounded numbers: when so many entries more than the budget are stored."""
    policy = policy_of(f"snapkv:budget=100,window=32,recompress_every={every}", 32)
    rounded = policy.rounded(prompt)
    assert rounded.recompress_every == every // 32 * 32 and 68 < rounded.budget <= 100
    stored, cuts, freed = prompt, 0, 0
    if rounded.entries(prompt) < prompt:
        stored = rounded.entries(prompt)
    blocks = set(range(-(-prompt // 32)))
    for computed in range(prompt, prompt + 300):
        blocks.add(computed // 32)
        first, last = policy.gap(prompt, computed)
        due = stored - rounded.budget >= rounded.recompress_every
        if due:
            stored = rounded.budget
        cut = policy.cut(prompt, computed)
        assert (cut is not None) == (due or (computed == prompt and stored < prompt))
        following = next(at for at in range(computed + 1, computed + 200) if policy.cut(prompt, at))
        assert policy.looks_back(prompt, computed) == max(-1, 32 - (following - computed))
        if cut is not None:
            cuts += 1
            assert set(cut.blocks) <= blocks and cut.at == computed and (first, last) == (cut.kept, computed // 32)
            held = cut.kept * 32 + computed % 32
            assert held == rounded.budget == stored and cut.entries > stored
            assert -(-cut.entries // 32) == len(cut.blocks)
        assert computed - max(0, last - first) * 32 == stored  # what the step reads, besides its own token
        freed_first, freed_last = policy.freed(prompt, computed)
        assert freed_last - freed_first <= max(0, last - first)
        if cut is not None and computed > prompt:
            assert (freed_first, freed_last) == policy.gap(prompt, computed - 1)  # not before they have moved
        blocks -= set(range(freed_first, freed_last))
        freed = max(freed, freed_last - freed_first)
        stored += 1
    assert cuts >= 3 and len(blocks) <= (100 + every) // 32 + 2 and freed > 3


def test_cuts_closer_than_a_block_are_refused():
    with pytest.raises(ConfigError, match="recompress_every here is at least 32"):
        policy_of("snapkv:budget=100,recompress_every=31", 32)


def test_a_stream_keeps_its_budget_at_every_step():
    policy = policy_of("streaming_llm:budget=192", 32)
    for computed in range(700, 1000):
        first, last = policy.gap(700, computed)
        assert first == 1 and 192 - 32 < computed + 1 - (last - first) * 32 <= 192
    with pytest.raises(ConfigError, match="give budget"):
        policy_of("streaming_llm:ratio=0.5", 32)


def test_a_block_table_without_a_gap():
    table = torch.arange(21).view(3, 7)
    assert shorter(table, [(0, 0), (1, 3), (2, 6)])[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert shorter(table, [(0, 0), (1, 3), (2, 6)])[1, :5].tolist() == [7, 10, 11, 12, 13]
    assert shorter(table, [(0, 0), (1, 3), (2, 6)])[2, :3].tolist() == [14, 15, 20]


def test_what_a_worker_notes_of_a_request():
    requests = Requests(policy_of("random:budget=80,window=8", 32), 32, limit=4)
    table = torch.tensor([[5, 6, 7, 8, 9]])
    step, gaps = requests.step(table, [0, 96], [96], [True])
    assert step.observed == [ObservedRows(5, True, 0, 96)] and not step.moves and gaps == [(0, 0)]
    step, gaps = requests.step(table, [0, 40], [136], [True])  # the second chunk ends the prompt
    assert step.observed == [ObservedRows(5, False, 0, 40)]
    step, gaps = requests.step(table, [0, 1], [137], [False])
    assert step.forgotten == [5] and not step.observed
    (move,) = step.moves
    assert (move.name, move.prompt, move.entries, move.kept) == (5, 136, 136, 2)
    assert move.blocks.tolist() == [5, 6, 7, 8, 9] and gaps == [(2, 4)]
    step, gaps = requests.step(table, [0, 1], [170], [False])
    assert not step.moves and not step.forgotten and gaps == [(2, 4)]
    requests.step(table, [0, 20], [20], [True])  # another request in the same blocks, shorter than the budget
    step, gaps = requests.step(table, [0, 1], [21], [False])
    assert not step.moves and step.forgotten == [5] and gaps == [(0, 0)]  # its queries are of no use any more
    assert requests.step(table, [0, 0], [0], [False])[1] == [(0, 0)]  # a row that fills a graph


def test_notes_of_requests_that_never_came_back_are_dropped():
    requests = Requests(policy_of("random:budget=80", 32), 32, limit=2)
    for name in range(20):
        requests.step(torch.tensor([[name, 99]]), [0, 1], [41], [False])
    assert len(requests._prompts) == 4


@pytest.mark.parametrize("pages", [SplitPages(), VecPages()], ids=["split", "vec"])
def test_pages_are_read_as_they_are_written(pages):
    cache = torch.full((6, 2, 4, 6), float("nan"))
    keys, values = torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    pages.write(cache, torch.tensor([4, 1]), keys, values)
    found = pages.read(cache, torch.tensor([4, 1]))
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert cache[[0, 2, 3, 5]].isnan().all() and not cache[[1, 4]].isnan().any()
    if isinstance(pages, SplitPages):
        assert torch.equal(cache[1, 0, 2], torch.cat([keys[0, 6], values[0, 6]]))
    else:  # keys [D, block], values [block, D]
        flat = cache[1, 0].flatten()
        assert torch.equal(flat[:12].view(3, 4)[:, 2], keys[0, 6])
        assert torch.equal(flat[12:].view(4, 3)[2], values[0, 6])
