"""What the server answers is what ``generate`` says, through OpenAI's own client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import llm_accel
from llm_accel import cli
from llm_accel.eval.grid import GridPoint
from tests.eval.needle_helpers import make_maker
from tests.serve.kit import Running

QUESTION: Any = [{"role": "user", "content": "The special magic number"}]


def needle_prompts() -> list[list[int]]:
    maker = make_maker()
    return [list(maker.make(GridPoint(length, 50.0, sample)).ids) for sample, length in enumerate((300, 512, 431, 640))]


def generated(needle: tuple[Any, Any], ids: list[int], method: str | None, tokens: int) -> str:
    """What the model says to one prompt alone."""
    model, tokenizer = needle
    config = None if method is None else llm_accel.registry.parse(method)
    handle = None if config is None else llm_accel.apply(model, config)
    try:
        row = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :]
    finally:
        llm_accel.remove(model)
    assert handle is None or handle.config == config
    return str(tokenizer.decode(row, skip_special_tokens=True))


def test_needles_that_run_together_equal_plain_generate(running: Running, needle: tuple[Any, Any]) -> None:
    prompts = needle_prompts()
    expected = [generated(needle, ids, "snapkv:budget=128", 12) for ids in prompts]
    before = running.metrics()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: running.complete(ids, max_tokens=12).json(), prompts))
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    running.idle()
    after = running.metrics()
    steps, rows = (
        after[f"llm_accel_step_rows_{one}"] - before[f"llm_accel_step_rows_{one}"] for one in ("count", "sum")
    )
    assert steps < rows, "no step had several rows"
    names = ("kv_bytes_saved", "kv_bytes_held", "kv_bytes_dense", "physical_tokens", "logical_tokens")
    labelled = [f'llm_accel_{name}_total{{method="snapkv"}}' for name in names]
    saved, held, dense, physical, logical = (after[name] - before.get(name, 0) for name in labelled)
    assert saved == dense - held > 0 and physical < logical


def test_needle_answers_equal_those_of_the_command_line(running: Running, tmp_path: Path) -> None:
    grid = ["--lengths", "300,500", "--depths", "2", "--samples", "2", "--method", "snapkv:budget=128", "--no-plot"]
    assert cli.main(["needle", *grid, "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    maker = make_maker(lengths=(300, 500))
    prompts = [list(maker.make(GridPoint(one["length"], one["depth"], one["sample"])).ids) for one in records]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ids: running.complete(ids, max_tokens=maker.max_new_tokens).json(), prompts))
    assert [one["choices"][0]["text"] for one in answers] == [one["answer"] for one in records]
    assert len(records) == 8 and sum(one["exact"] for one in records) >= 7


def test_a_request_chooses_its_method(running: Running, needle: tuple[Any, Any]) -> None:
    ids = needle_prompts()[0]
    client = running.client()
    for method in ("dense", "streaming_llm:budget=64"):
        answer: Any = client.completions.create(
            model="needle", prompt=ids, max_tokens=12, extra_body={"llm_accel": {"method": method}}
        )
        assert answer.choices[0].text == generated(needle, ids, None if method == "dense" else method, 12)
        assert answer.llm_accel == {"method": method}


def test_chat_and_stream_say_the_same(running: Running, needle: tuple[Any, Any]) -> None:
    client, (_, tokenizer) = running.client(), needle
    whole = client.chat.completions.create(model="needle", messages=QUESTION, max_tokens=20)
    chunks = list(
        client.chat.completions.create(
            model="needle", messages=QUESTION, max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert whole.choices[0].message.content == generated(needle, ids, "snapkv:budget=128", 20)
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[0].delta.role == "assistant" and len(pieces) > 3
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids) and whole.usage.completion_tokens <= 20


def test_stop_strings_end_the_answer_before_them(running: Running) -> None:
    client = running.client()
    whole = client.completions.create(model="needle", prompt="The dog", max_tokens=16).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = client.completions.create(model="needle", prompt="The dog", max_tokens=16, stop=["never said", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"


def test_seeds_repeat_whatever_shares_the_batch(running: Running) -> None:
    def sampled(seed: int) -> Any:
        fields = {"temperature": 1.0, "top_p": 0.95, "seed": seed, "n": 2, "max_tokens": 8}
        return [choice["text"] for choice in running.complete(**fields).json()["choices"]]

    alone = sampled(1)
    with ThreadPoolExecutor(2) as pool:
        together, other = pool.map(sampled, (1, 2))
    assert alone == together and len({*alone, *other}) == 4


def test_logprobs_are_those_of_the_model(running: Running, needle: tuple[Any, Any]) -> None:
    model, tokenizer = needle
    ids = tokenizer("The dog")["input_ids"]
    chat: Any = running.client().chat.completions.create(
        model="needle", messages=QUESTION, max_tokens=2, logprobs=True, top_logprobs=3
    )
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 2 and all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    answer = running.complete("The dog", max_tokens=1, logprobs=2).json()["choices"][0]["logprobs"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2)
    assert answer["token_logprobs"][0] == answer["top_logprobs"][0][answer["tokens"][0]]
    torch.testing.assert_close(torch.tensor(list(answer["top_logprobs"][0].values())), expected.values)


def test_several_prompts_and_the_model_list(running: Running) -> None:
    client = running.client()
    both = client.completions.create(model="needle", prompt=["The dog", "12 345"], max_tokens=4)
    single = [client.completions.create(model="needle", prompt=p, max_tokens=4) for p in ("The dog", "12 345")]
    assert [choice.text for choice in both.choices] == [one.choices[0].text for one in single]
    assert both.usage and both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in single if one.usage)
    assert [model.id for model in client.models.list()] == ["needle"] == [client.models.retrieve("needle").id]
