"""What freed blocks are worth: requests that run at the same time in a pool of a given size."""

from __future__ import annotations

import importlib.util

import pytest

from tests.integrations.vllm import kit

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
PROMPT, NEW, REQUESTS, BLOCKS = 640, 128, 16, 110


def running(llm) -> tuple[float, int]:
    """Requests that run in a step, on average, and steps until all are done."""
    from vllm import SamplingParams

    core = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True)
    for index, prompt in enumerate(kit.prompts([PROMPT] * REQUESTS)):
        core.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    seen = []
    while core.has_unfinished_requests():
        core.step()
        seen.append(len(kit.scheduler(llm).running))
    return sum(seen) / len(seen), len(seen)


def freed_by_arithmetic(policy, restarts: list[list[int]]) -> int:
    """Blocks that leave early: of each request and of each time that it began anew, with prompt and reply so far."""
    total = 0
    for replies in restarts:
        for begin, end in zip([0, *replies], [*replies, NEW], strict=True):
            first, last = policy.gap(PROMPT + begin, PROMPT + begin)
            total += (last - first) * (end - begin > 2)  # they leave when the second decode step is planned
    return total


def test_twice_as_many_requests_run_in_the_same_memory():
    found = {}
    for method in (None, "snapkv:budget=192"):
        options = {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": REQUESTS, "enable_prefix_caching": False}
        with kit.engine(method=method, async_scheduling=False, **options) as llm:
            begin = kit.pool(llm).get_num_free_blocks()
            with kit.preempted(llm) as lengths:
                found[method] = running(llm)
            assert kit.pool(llm).get_num_free_blocks() == begin
            if method is not None:
                manager, restarts = kit.manager(llm), list(lengths.values())
                never = [[]] * (REQUESTS - len(restarts))
                assert manager.freed == freed_by_arithmetic(manager.kv_cache_spec.policy, restarts + never) > 200
    (dense, dense_steps), (ours, steps) = found.values()
    print(f"running: dense {dense:.2f} in {dense_steps} steps, {method} {ours:.2f} in {steps} steps")
    print(f"freed {manager.freed} blocks, {sum(map(len, restarts))} times anew")
    assert ours >= 1.9 * dense and steps < 0.6 * dense_steps
