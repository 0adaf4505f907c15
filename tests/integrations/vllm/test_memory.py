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


def test_twice_as_many_requests_run_in_the_same_memory():
    found = {}
    for method in (None, "snapkv:budget=192"):
        options = {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": REQUESTS, "enable_prefix_caching": False}
        with kit.engine(method=method, **options) as llm:
            begin = kit.pool(llm).get_num_free_blocks()
            found[method] = running(llm)
            assert kit.pool(llm).get_num_free_blocks() == begin
    (dense, dense_steps), (ours, steps) = found.values()
    print(f"running: dense {dense:.2f} in {dense_steps} steps, {method} {ours:.2f} in {steps} steps")
    assert ours >= 1.9 * dense and steps < 0.6 * dense_steps
