"""Rows that come and go: each answer is what ``generate`` says to its prompt alone, whatever runs beside it."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import llm_accel
from llm_accel.methods import HiP, MethodConfig, RetrievalHeads, SnapKV, StreamingLLM
from llm_accel.patches.cache_name import CACHE
from llm_accel.serve.detokenizer import Detokenizer
from llm_accel.serve.engine import Engine
from llm_accel.serve.loading import Served
from llm_accel.serve.logprobs import TokenLogprob
from llm_accel.serve.sampling import Sampling
from llm_accel.serve.sequences import Delta, Job
from llm_accel.serve.settings import ServeSettings
from tests.contracts.matrix import AGAIN as AGAIN_NAMES
from tests.contracts.matrix import BUDGET, METHODS, small
from tests.families.build import text_model
from tests.tiny import distinct, sliding_mistral, tiny_model

CHUNK = 40  # tokens of prompts in a round: long prompts take three, several short ones share one
Methods = tuple[MethodConfig, ...]


class Numbers:
    """A tokenizer whose text of a token is its number."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"{token};" for token in ids)


class Driven:
    """An engine whose rounds the test counts, in place of a thread."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.engine = Engine(
            Served(model, Numbers(), None, "tiny"), ServeSettings(**{"max_step_tokens": CHUNK} | options)
        )

    def submit(self, prompts: Sequence[tuple[int, ...]], methods: Methods, new: int, **more: Any) -> Job:
        sampling = Sampling(logprobs=0, **more.pop("sampling", {}))
        stops = more.pop("stops", ())
        job = Job(prompts, methods, sampling, new, lambda: Detokenizer(Numbers(), stops), **more)
        self.engine.submit(job)
        return job

    def round(self) -> None:
        self.engine._round()

    def finish(self) -> None:
        while self.engine.running or len(self.engine.scheduler):
            self.round()
        self.engine._round()


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(distinct(length, seed)[0].tolist())


def alone(model: Any, methods: Methods, prompt: tuple[int, ...], new: int) -> tuple[list[int], torch.Tensor]:
    """Tokens and their log-probabilities as plain ``generate`` has them."""
    handle = llm_accel.apply(model, methods) if methods else None
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    if handle is not None:
        handle.remove()
    tokens = output.sequences[0, len(prompt) :]
    known = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return tokens.tolist(), known.gather(-1, tokens[:, None])[:, 0]


def logprobs_of(job: Job, index: int) -> list[TokenLogprob]:
    """Those that were sent for one answer so far."""
    deltas = [event for event in job._events._queue if isinstance(event, Delta) and event.index == index]  # type: ignore[attr-defined]
    return [one for delta in deltas for one in delta.logprobs]


def check(model: Any, job: Job) -> None:
    """Every answer is that of its prompt alone, as far as it got."""
    for row in job.sequences:
        tokens, logprobs = alone(model, job.methods, row.prompt, job.max_new_tokens)
        ends = [place for place, token in enumerate(tokens) if token in job.sampling.stop_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        if not job.cancelled:
            assert row.finish == ("stop" if ends else "length") and len(row.tokens) == len(tokens)
        assert row.tokens == tokens[: len(row.tokens)], (job.method_name, len(row.prompt))
        said = torch.tensor([one.logprob for one in logprobs_of(job, row.index)])
        torch.testing.assert_close(said, logprobs[: len(said)], rtol=1e-4, atol=1e-4)


OTHERS: dict[str, Methods] = {
    "dense": (),
    "recompressed": (SnapKV(budget=BUDGET, window=8, recompress_every=6),),
    "ratio": (SnapKV(ratio=0.4, window=8),),
    "deferred": (SnapKV(budget=BUDGET, window=8, compress="deferred"),),
    "ratio that overwrites": (StreamingLLM(ratio=0.4),),
    "positions in the cache": (StreamingLLM(budget=BUDGET, positions="cache"),),
    "head groups": (RetrievalHeads(head_list=("0.0", "1.1"), sinks=2, recent=10),),
    "sparse": (HiP(),),
}
ALL: dict[str, Methods] = {name: (make(),) for name, make in METHODS.items()} | OTHERS


LOAD = [(90, 12), (9, 30), (17, 5), (60, 3), (8, 9), (110, 7), (30, 24), (70, 2)]  # tokens of prompts and answers


@pytest.mark.parametrize("apart", [0, 6], ids=["all at once", "one by one"])
@pytest.mark.parametrize("name", ALL)
def test_rows_come_and_go(name: str, apart: int) -> None:
    """Prompts that begin while others run, one of which is cancelled; some share a chunk, and some a prompt."""

    async def scenario() -> None:
        model = tiny_model("llama")
        driven, rng = Driven(copy.deepcopy(model), max_batch=4), random.Random(name)
        jobs = []
        for number, (length, new) in enumerate(LOAD):
            jobs.append(driven.submit([ids(length, number)] * (2 if number == 2 else 1), ALL[name], new))
            for _ in range(rng.randrange(apart) if apart else 0):
                driven.round()
            if number == 5:
                driven.engine.cancel(jobs[1])
        driven.finish()
        await asyncio.sleep(0)  # what was sent arrives
        for job in jobs:
            check(model, job)
        assert not driven.engine._groups and driven.engine.nbytes == 0

    asyncio.run(scenario())


def turns_alone(model: Any, methods: Methods, turns: Sequence[tuple[int, ...]], new: int) -> list[list[int]]:
    """What ``generate`` says in each turn of a conversation that keeps its cache."""
    handle = llm_accel.apply(model, methods) if methods else None
    cache: Any = DynamicCache(config=model.config) if handle is None else handle.new_cache()
    seen, said = [], []
    for turn in turns:
        seen += [*turn]
        given, mask = torch.tensor([seen]), torch.ones(1, len(seen), dtype=torch.long)
        output = model.generate(given, attention_mask=mask, **{CACHE: cache}, max_new_tokens=new, do_sample=False)
        said.append(output[0, len(seen) :].tolist())
        seen = output[0].tolist()
    if handle is not None:
        handle.remove()
    return said


AGAIN: dict[str, Methods] = {
    name: (small(type(make()), multi_turn="recompress"),) for name, make in METHODS.items() if name in AGAIN_NAMES
}


@pytest.mark.parametrize("name", [*ALL, *(f"{name} again" for name in AGAIN)])
def test_conversations_go_on_beside_others(name: str) -> None:
    """Three conversations of three turns each, whose caches share steps with others and leave them between turns."""
    methods = AGAIN[name.removesuffix(" again")] if name.endswith(" again") else ALL[name]
    lengths = {"a": (60, 12, 40), "b": (7, 60, 5), "c": (20, 3, 30)}
    talks = {key: [ids(length, 10 * n + ord(key)) for n, length in enumerate(row)] for key, row in lengths.items()}

    async def scenario() -> None:
        model = tiny_model("llama")
        driven = Driven(copy.deepcopy(model), max_batch=6)
        seen: dict[str, tuple[int, ...]] = dict.fromkeys(talks, ())
        said: dict[str, list[list[int]]] = {key: [] for key in talks}
        for turn in range(3):
            jobs = {}
            for number, key in enumerate(talks):
                seen[key] += talks[key][turn]
                jobs[key] = driven.submit([seen[key]], methods, 6, session=("", key))
                for _ in range(number):
                    driven.round()
            other = driven.submit([ids(30, turn)], methods, 20)
            driven.finish()
            for key, job in jobs.items():
                said[key].append(job.sequences[0].tokens)
                seen[key] += tuple(said[key][-1])
                assert (job.reused_tokens > 0) == (turn > 0)
            check(model, other)
        for key, turns in talks.items():
            assert said[key] == turns_alone(model, methods, turns, 6), key

    asyncio.run(scenario())


FAMILIES = ("gemma3", "gpt_oss", "deepseek_v3", "qwen3_moe")
MIXED: tuple[Methods, ...] = (
    (),
    (SnapKV(budget=BUDGET, window=8),),
    (SnapKV(budget=BUDGET, window=8, recompress_every=6),),
    (small(type(METHODS["h2o"]())),),
    (StreamingLLM(budget=BUDGET),),
    (small(type(METHODS["adakv"]())),),
    (HiP(),),
)


def model_of(family: str) -> Any:
    if family == "all sliding":  # nothing to compress: no method works there, not even the one that keeps everything
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(sliding_mistral()).float().eval()
    return text_model(family) if family == "qwen3_next" else tiny_model(family)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next", "all sliding", "llama"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes(family: str, seed: int) -> None:
    """Random arrivals, methods, lengths, several answers, stops, cancellations and conversations in one engine."""

    async def scenario() -> None:
        model = model_of(family)
        driven, rng = Driven(copy.deepcopy(model), max_batch=5), random.Random(seed)
        methods = [one for one in MIXED if works(model, one)]
        assert len(methods) > 2 or family == "all sliding"
        jobs: list[Job] = []
        for number in range(16):
            prompt = ids(rng.choice([2, 5, 11, 30, 70, 110]), 100 * seed + number)
            stop = {"stop_token_ids": frozenset(rng.sample(range(100), 4))} if rng.random() < 0.4 else {}
            session = ("", rng.choice("ab")) if rng.random() < 0.3 else None
            count = 1 if session is not None else rng.choice([1, 1, 1, 3])
            new = rng.choice([1, 3, 10, 25])
            jobs.append(driven.submit([prompt] * count, rng.choice(methods), new, session=session, sampling=stop))
            for _ in range(rng.randrange(8)):
                driven.round()
                if rng.random() < 0.05:
                    driven.engine.cancel(rng.choice(jobs))
            assert len(driven.engine.running) <= 5
        driven.finish()
        await asyncio.sleep(0)
        for job in jobs:
            check(model, job)
        assert not driven.engine._groups and driven.engine.metrics.failed_steps._value.get() == 0

    asyncio.run(scenario())


def works(model: Any, methods: Methods) -> bool:
    """Whether a family takes a method: where not, it says so to whoever asks, and there is nothing to compare."""
    try:
        if methods:
            llm_accel.apply(model, methods).remove()
    except llm_accel.UnsupportedModelError:
        return False
    return True
