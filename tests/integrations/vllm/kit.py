"""vLLM engines in this process, on the CPU, and what transformers with llm_accel says to the same prompts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import llm_accel
from llm_accel.common.bundled import needle_model_path
from llm_accel.integrations.vllm.blocks import Policy, Streaming, policy_of

BLOCK = 32
NEW = 32
LENGTHS = (300, 400, 64, 352)
TINY = {
    "vocab_size": 1624,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def engine(model: Any = None, method: str | None = None, processes: bool = False, **options: Any) -> Iterator[Any]:
    """A small engine; the bundled needle model where none is given. ``processes``: outside of this process."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "block_size": BLOCK, "max_num_seqs": 8}
    overrides = {} if method is None else {"llm_accel": {"method": method}}
    llm = None
    try:
        llm = LLM(str(model or needle_model_path()), **given | {"hf_overrides": overrides} | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def restless(folder: Path) -> Path:
    """A tiny model with wide random weights, whose replies never come to repeat themselves and hang on every entry."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(needle_model_path()).save_pretrained(folder)
    return folder


def prompts(lengths: Sequence[int] = LENGTHS, below: int = 1624) -> list[list[int]]:
    """Prompts of random tokens: the needle model answers each of them with tokens that hardly repeat."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, below, (length,), generator=generator).tolist() for length in lengths]


def answers(llm: Any, tokens: Sequence[Sequence[int]], new: int = NEW) -> list[list[int]]:
    """What an engine answers greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    given = [{"prompt_token_ids": list(prompt)} for prompt in tokens]
    return [list(one.outputs[0].token_ids) for one in llm.generate(given, sampling, use_tqdm=False)]


def expected(
    tokens: Sequence[Sequence[int]],
    method: str | None = None,
    new: int = NEW,
    model: Any = None,
    restarts: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """What transformers answers: with the budget that whole blocks amount to, or, for StreamingLLM, with a mask of the
    entries in the blocks that stay.

    Args:
        tokens: prompts.
        method: a KV method.
        new: tokens of each reply.
        model: its folder; the bundled needle model where none is given.
        restarts: for each prompt, the lengths of its reply at which the request began anew.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model or needle_model_path(), dtype=torch.float32).eval()
    found = []
    for index, prompt in enumerate(tokens):
        reply: list[int] = []
        for end in [*([] if restarts is None else restarts[index]), new]:
            given = [*prompt, *reply]
            if end > len(reply):
                reply += _reply(loaded, given, None if method is None else policy_of(method, BLOCK), end - len(reply))
        found.append(reply)
    return found


def _reply(model: Any, prompt: list[int], policy: Policy | None, new: int) -> list[int]:
    if isinstance(policy, Streaming):
        return _streamed(model, prompt, policy, new)
    ids = torch.tensor([prompt])
    more = {"attention_mask": torch.ones_like(ids)}
    if policy is not None:
        llm_accel.apply(model, policy.rounded(len(prompt)))
        if policy.method.cuts_every is None:  # what stands in the last block stays there
            more["protect_mask"] = torch.arange(len(prompt))[None] >= len(prompt) // BLOCK * BLOCK
        else:  # transformers protects nothing from later cuts
            assert policy.method.reserved >= BLOCK - 1
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
    llm_accel.remove(model)
    reply: list[int] = out[0, len(prompt) :].tolist()
    return reply


@torch.no_grad()
def _streamed(model: Any, prompt: list[int], policy: Streaming, new: int) -> list[int]:
    """Of full blocks, the first ones and the newest; and the block that is being filled."""
    cache, reply, given = DynamicCache(config=model.config), [], torch.tensor([prompt])
    for _ in range(new):
        length, mask = len(prompt) + len(reply), None
        if reply:
            block = torch.arange(length) // BLOCK
            newest = (length - 1) // BLOCK - policy.recent_blocks
            mask = ((block < policy.sink_blocks) | (block >= newest))[None, None, None]
        position = torch.arange(length - given.shape[1], length)[None]
        out = model(given, past_key_values=cache, position_ids=position, attention_mask=mask, logits_to_keep=1)
        reply.append(int(out.logits[0, -1].argmax()))
        given = torch.tensor([reply[-1:]])
    return reply


@contextmanager
def preempted(llm: Any) -> Iterator[dict[tuple[int, ...], list[int]]]:
    """The lengths that replies had when their requests were preempted, by prompt."""
    found: dict[tuple[int, ...], list[int]] = {}
    usual = scheduler(llm)._preempt_request

    def preempt(request: Any, *given: Any, **options: Any) -> Any:
        found.setdefault(tuple(request.prompt_token_ids), []).append(request.num_output_tokens)
        return usual(request, *given, **options)

    scheduler(llm)._preempt_request = preempt
    try:
        yield found
    finally:
        scheduler(llm)._preempt_request = usual


def pool(llm: Any) -> Any:
    """The block pool of an engine in this process."""
    return scheduler(llm).kv_cache_manager.block_pool


def manager(llm: Any) -> Any:
    """What frees the blocks of its first group of layers."""
    return scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]


def scheduler(llm: Any) -> Any:
    """Its scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler
