"""KV methods in vLLM: the same tokens as in transformers, blocks that are really free, and what would go wrong without
the guards. Engines run in this process; skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.vllm import kit

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
SNAP = "snapkv:budget=100"
RANDOM = "random:budget=100"
STREAM = "streaming_llm:budget=192"
NO_PREFIXES = {"enable_prefix_caching": False}


@pytest.fixture(scope="module")
def dense():
    return kit.expected(kit.prompts())


@pytest.fixture(scope="module")
def restless(tmp_path_factory):
    return kit.restless(tmp_path_factory.mktemp("restless"))


@pytest.fixture(scope="module")
def snap():
    return kit.expected(kit.prompts(), SNAP)


def test_the_plug_in_without_our_key_is_vllm_itself(dense):
    with kit.engine() as llm:
        assert kit.answers(llm, kit.prompts()) == dense
        assert type(kit.manager(llm)).__name__ == "FullAttentionManager"


def test_snapkv_frees_what_the_arithmetic_says_and_answers_as_in_transformers(snap, dense):
    assert sum(a != b for a, b in zip(snap, dense, strict=True)) == 3  # the prompt of 64 is within the budget
    with kit.engine(method=SNAP) as llm:
        begin = kit.pool(llm).get_num_free_blocks()
        assert kit.answers(llm, kit.prompts()) == snap
        policy, manager = kit.manager(llm).kv_cache_spec.policy, kit.manager(llm)
        gaps = [policy.gap(length, length) for length in kit.LENGTHS]
        assert manager.freed == sum(last - first for first, last in gaps) > 20
        assert kit.pool(llm).get_num_free_blocks() == begin
        # a second turn finds nothing by its prefix: those blocks were written to again
        second = llm.generate([{"prompt_token_ids": one} for one in kit.prompts()], use_tqdm=False)
        assert all(not one.num_cached_tokens for one in second)


@pytest.mark.parametrize(
    "options", [{"max_num_batched_tokens": 96}, {"async_scheduling": True}], ids=["chunks", "asynchronous"]
)
def test_snapkv_with_other_schedules(snap, options):
    with kit.engine(method=SNAP, **options) as llm:
        assert kit.answers(llm, kit.prompts()) == snap


def test_a_window_shorter_than_a_block_and_a_ratio():
    method = "random:ratio=0.4,window=4"
    with kit.engine(method=method) as llm:
        assert kit.answers(llm, kit.prompts()) == kit.expected(kit.prompts(), method)


@pytest.mark.parametrize(
    "method",
    [
        "snapkv:budget=100,window=40,recompress_every=40",  # a cut looks at queries from before the last one
        "snapkv:budget=100,recompress_every=70",
        "random:budget=100,recompress_every=70",
    ],
)
@pytest.mark.parametrize(
    "options",
    [{"async_scheduling": False, "enforce_eager": False}, {"max_num_batched_tokens": 96, "async_scheduling": True}],
    ids=["compiled", "chunks and asynchronous"],
)
def test_replies_that_are_cut_while_they_are_decoded(method, options, restless):
    """A prompt within the budget among them, whose reply grows out of it; each is cut several times."""
    tokens, new = kit.prompts(), 150
    wanted = kit.expected(tokens, method, new, restless)
    once = kit.expected(tokens, method.partition(",")[0], new, restless)
    assert all(a != b for a, b in zip(wanted, once, strict=True))
    with kit.engine(restless, method, **options) as llm:
        begin = kit.pool(llm).get_num_free_blocks()
        assert kit.answers(llm, tokens, new) == wanted
        manager = kit.manager(llm)
        ends = [manager.kv_cache_spec.policy.freed(len(prompt), len(prompt) + new - 2) for prompt in tokens]
        assert manager.freed == sum(last - first for first, last in ends) > 30
        assert kit.pool(llm).get_num_free_blocks() == begin


@pytest.mark.parametrize(
    ("method", "blocks"), [(RANDOM, 24), (SNAP, 24), (STREAM, 24), ("snapkv:budget=100,recompress_every=32", 18)]
)
def test_requests_that_were_preempted_are_compressed_anew(method, blocks, restless):
    """A pool for a third of the requests as they come, so that some lose their place on the way. Such a request begins
    anew with prompt and reply as its prompt, and so it does in transformers."""
    tokens = kit.prompts([200 + 8 * one for one in range(8)])
    # prefix caching would give a stream its old entries back
    options = {"num_gpu_blocks_override": blocks, "max_model_len": 512, "async_scheduling": False} | NO_PREFIXES
    with kit.engine(restless, method, **options) as llm:
        begin = kit.pool(llm).get_num_free_blocks()
        with kit.preempted(llm) as lengths:
            found = kit.answers(llm, tokens, new=80)
        assert kit.pool(llm).get_num_free_blocks() == begin
    restarts = [lengths.get(tuple(prompt), []) for prompt in tokens]
    assert any(0 < one < 80 for some in restarts for one in some)
    assert found == kit.expected(tokens, method, 80, restless, restarts)


def test_without_the_guard_a_second_turn_would_read_other_tokens(snap, monkeypatch):
    from llm_accel.integrations.vllm.scheduling import CompressedSpec

    monkeypatch.setattr(CompressedSpec, "prefix_cacheable", property(lambda _spec: True))
    with kit.engine(method=SNAP) as llm:
        kit.answers(llm, kit.prompts())
        assert kit.answers(llm, kit.prompts()) != snap


def test_freeing_before_the_entries_have_moved_would_lose_them(snap, monkeypatch):
    """Blocks that are freed in the step that moves them are handed to other requests of the same step."""
    from llm_accel.integrations.vllm.scheduling import CompressedManager

    usual = CompressedManager.remove_skipped_blocks

    def early(self, request_id, processed_computed_tokens, num_prompt_tokens=None):
        usual(self, request_id, processed_computed_tokens, num_prompt_tokens)
        prompt = self._prompts.get(request_id)
        if prompt is not None:
            self._remove_blocks_in_range(request_id, *self.kv_cache_spec.policy.gap(prompt, prompt))

    tokens = kit.prompts(kit.LENGTHS * 2)
    wanted = kit.expected(tokens, SNAP)
    options = {"num_gpu_blocks_override": 30, "max_num_batched_tokens": 416, "max_model_len": 512}
    with kit.engine(method=SNAP, **options) as llm:
        kept = sum(a == b for a, b in zip(kit.answers(llm, tokens), wanted, strict=True))
    monkeypatch.setattr(CompressedManager, "remove_skipped_blocks", early)
    with kit.engine(method=SNAP, **options) as llm:
        assert sum(a == b for a, b in zip(kit.answers(llm, tokens), wanted, strict=True)) < kept


def test_streaming_llm_by_whole_blocks():
    """As transformers answers with a mask of the same entries: one block of sinks, four recent ones, and the newest."""
    tokens = kit.prompts()
    wanted = kit.expected(tokens, STREAM)
    with kit.engine(method=STREAM) as llm:
        begin = kit.pool(llm).get_num_free_blocks()
        assert kit.answers(llm, tokens) == wanted
        assert kit.manager(llm).freed > 10 and kit.pool(llm).get_num_free_blocks() == begin
        again = llm.generate([{"prompt_token_ids": one} for one in tokens], use_tqdm=False)
        assert any(one.num_cached_tokens for one in again)  # blocks are never written to again
        assert kit.answers(llm, tokens) == wanted


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_two_workers_share_the_heads(tmp_path):
    """Scheduler and workers in processes of their own; what is drawn for a head does not depend on who holds it."""
    script = tmp_path / "ask.py"
    script.write_text(
        "import json, os\n"
        "if __name__ == '__main__':\n"
        "    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING='1', VLLM_CPU_OMP_THREADS_BIND='0|1')\n"
        "    from tests.integrations.vllm import kit\n"
        f"    with kit.engine(method={RANDOM!r}, tensor_parallel_size=2) as llm:\n"
        "        print('ANSWERS', json.dumps(kit.answers(llm, kit.prompts())))\n"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], cwd=root, env=environment, capture_output=True, text=True)
    line = next((one for one in done.stdout.splitlines() if one.startswith("ANSWERS ")), None)
    assert line is not None, done.stderr[-2000:]
    assert json.loads(line.removeprefix("ANSWERS ")) == kit.expected(kit.prompts(), RANDOM)
