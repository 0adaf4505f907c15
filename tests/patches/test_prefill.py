"""Prompts read a few at a time, and MLPs that compute some tokens at a time: the same as all at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

import llm_accel
from llm_accel import ConfigError, Handle, UnsupportedCallError, UnsupportedModelError
from llm_accel.eval.tasks.bench.memory import TensorBytes
from llm_accel.registry import parse
from tests.patches.calls import Outside
from tests.tiny import CONFIGS, left_padded, prompt, tiny_model

CLOSE = 1e-5
NEW = 8
SNAPKV = "snapkv:budget=24,window=8"
METHODS = (
    SNAPKV,
    "pyramidkv:budget=24,window=8,beta=2,kernel=5",
    "adakv:budget=24,window=8,page=8",
    "adakv:budget=24,window=8,page=8,recompress_every=3",
    "h2o:budget=24",
    "streaming_llm:budget=24",
    "streaming_llm:budget=24,positions=cache",
    "random:budget=24,window=8",
    "retrieval_heads:head_list=0.0+1.1,recent=16,sinks=4,full_budget=40",
    "dense:capacity=64",  # `dense` alone means no plug-in
)
LONG = left_padded([72, 15, 37])  # one row fits into the budget
SHORT = left_padded([12, 9])


def decoded(model: PreTrainedModel, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New token ids [B, NEW] and their logits [B, NEW, vocabulary]."""
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options)
    return output.sequences[:, -NEW:], torch.stack(output.logits, dim=1)


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Tokens equal, logits close."""
    return torch.equal(one[0], other[0]) and torch.allclose(one[1], other[1], atol=CLOSE)


def held(handle: Handle) -> list[tuple[Any, ...]]:
    """What each layer holds, and which entries those are."""
    layers = handle.report().layers
    kept = [None if layer.kept is None else layer.kept.tolist() for layer in layers]
    sizes = [(layer.logical_length, layer.physical_length, layer.evicted, layer.kv_bytes) for layer in layers]
    return list(zip(sizes, kept, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", ["h2o:ratio=0.4", "streaming_llm:ratio=0.4,sinks=2"])
def test_a_part_of_each_prompt_is_no_number_of_slots_for_all(method: str, model: PreTrainedModel) -> None:
    """A layer overwrites one number of slots: rows of other lengths would keep more than they keep alone."""
    refused = "prompts of 15 to 72 tokens in one batch"
    ids, mask = LONG
    with llm_accel.apply(model, parse(method)) as handle:
        with pytest.raises(UnsupportedCallError, match=refused):
            decoded(model, input_ids=ids, attention_mask=mask)
        with pytest.raises(UnsupportedCallError, match=refused):
            handle.prefill(ids, mask)
        cache = handle.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)  # a prompt alone is cut as each row would be
        with pytest.raises(UnsupportedCallError, match=refused):
            model(ids[:, :1], past_key_values=cache)
        alike = prompt(72, batch=2)
        whole, alone = (decoded(model, input_ids=rows) for rows in (alike, alike[1:]))
        assert torch.equal(whole[0][1:], alone[0])
        padded = left_padded([32, 31])
        both = decoded(model, input_ids=padded[0], attention_mask=padded[1])  # 13 entries of either
        alone = decoded(model, input_ids=padded[0][1:, 1:])
        assert same((both[0][1:], both[1][1:]), alone)


@pytest.mark.parametrize("method", METHODS)
def test_reading_a_few_prompts_at_a_time_equals_one_call(method: str, model: PreTrainedModel) -> None:
    for ids, mask in (LONG, SHORT):
        with llm_accel.apply(model, parse(method), trace=True) as handle:
            expected = decoded(model, input_ids=ids, attention_mask=mask)
            report = held(handle)
            for rows in (1, 2):
                cache = handle.prefill(ids, mask, rows=rows)
                given = cache.inputs if rows == 1 else copy.deepcopy(cache).inputs
                assert same(decoded(model, **given), expected), (rows, ids.shape)
                assert held(handle) == report


@pytest.mark.parametrize("family", ["gemma3", "deepseek_v3", "gpt_oss"])
def test_other_layers_are_joined_too(family: str) -> None:
    model, (ids, mask) = tiny_model(family), LONG
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        expected = decoded(model, input_ids=ids, attention_mask=mask)
        assert same(decoded(model, **handle.prefill(ids, mask).inputs), expected)


def test_prompts_may_come_as_a_list_and_rows_may_be_repeated(model: PreTrainedModel) -> None:
    (ids, mask), prompts = LONG, [prompt(72, 1)[0], prompt(15, 2)[0], prompt(37, 3)[0]]
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        expected = decoded(model, input_ids=ids, attention_mask=mask)
        cache = handle.prefill(prompts, rows=2)
        assert torch.equal(cache.inputs["input_ids"], ids) and torch.equal(cache.inputs["attention_mask"], mask)
        cache.batch_repeat_interleave(2)
        tokens, logits = decoded(model, **cache.inputs)
        assert same((tokens[::2], logits[::2]), expected) and torch.equal(tokens[::2], tokens[1::2])
        protect = torch.zeros_like(ids, dtype=torch.bool)
        protect[0, 5] = protect[2, 40] = True
        kept = decoded(model, input_ids=ids, attention_mask=mask, protect_mask=protect)
        assert same(decoded(model, **handle.prefill(ids, mask, protect_mask=protect).inputs), kept)


def test_reading_one_prompt_at_a_time_bounds_memory(model: PreTrainedModel) -> None:
    ids = prompt(256, batch=8)
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        peaks = []
        for rows in (8, 1):
            with TensorBytes() as memory:
                handle.prefill(ids, rows=rows)
            peaks.append(memory.peak)
    assert peaks[1] < 0.4 * peaks[0]


def test_what_cannot_be_joined_or_continued_is_said(model: PreTrainedModel, tmp_path: Path) -> None:
    ids, mask = LONG
    for method, says in (
        ("hip", "keeps the whole cache"),
        ("h2o:budget=24,semantics=sim", "evicts none"),
        ("snapkv:budget=24,window=8,compress=deferred", "deferred"),
    ):
        with llm_accel.apply(model, parse(method)) as handle, pytest.raises(UnsupportedCallError, match=says):
            handle.prefill(ids, mask)
    with llm_accel.apply(model, parse(SNAPKV)) as handle:
        for arguments, says in (
            ((ids[0],), "give token ids"),
            (([],), "list of 1-D"),
            ((ids, mask.flip(1)), "zeros on the left"),
            (([ids[0]], mask), "leave it out"),
        ):
            with pytest.raises(ConfigError, match=says):
                handle.prefill(*arguments)
        with pytest.raises(ConfigError, match="rows=0"):
            handle.prefill(ids, mask, rows=0)
        with handle.disabled(), pytest.raises(UnsupportedCallError, match="disabled"):
            handle.prefill(ids, mask)
        cache = handle.prefill(ids, mask)
        with pytest.raises(UnsupportedCallError, match=r"cache\.inputs"):
            model(prompt(1, seed=9, batch=3), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="batch_repeat_interleave"):
            model.generate(**cache.inputs, num_beams=2, max_new_tokens=2)
        with pytest.raises(UnsupportedCallError, match="output_hidden_states"):
            model(ids[:, -1:], past_key_values=cache, output_hidden_states=True)
        with pytest.raises(UnsupportedCallError, match="protect_mask"):
            model.generate(**cache.inputs, protect_mask=mask.bool(), max_new_tokens=2)
        with pytest.raises(UnsupportedCallError, match="not been continued"):
            handle.save_cache(cache, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_an_mlp_in_chunks_computes_the_same_and_is_undone(family: str) -> None:
    model, (ids, mask) = tiny_model(family), LONG
    before, plain = Outside.of(model), model(ids, attention_mask=mask).logits
    with llm_accel.apply(model, parse(SNAPKV)):
        expected = decoded(model, input_ids=ids, attention_mask=mask)
    with llm_accel.apply(model, parse(SNAPKV), mlp_chunk=20) as handle:
        assert handle.report().backends["mlp"][0] == "20 tokens at a time"
        assert same(decoded(model, input_ids=ids, attention_mask=mask), expected)
        assert same(decoded(copy.deepcopy(model), input_ids=ids, attention_mask=mask), expected)
        with handle.disabled():
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert Outside.of(model) == before
    assert not any("_compiled_call_impl" in part.__dict__ for part in model.modules())


def test_chunks_need_less_memory_and_impossible_ones_are_refused() -> None:
    model = wide_model()
    with pytest.raises(ConfigError, match="mlp_chunk=0"):
        llm_accel.apply(model, parse(SNAPKV), mlp_chunk=0)
    with pytest.raises(UnsupportedModelError, match="more than one tensor"):
        llm_accel.apply(tiny_model("gpt_oss"), parse(SNAPKV), mlp_chunk=20)
    peaks = []
    for chunk in (None, 64):
        with llm_accel.apply(model, parse(SNAPKV), mlp_chunk=chunk), TensorBytes() as memory:
            model.generate(prompt(1024), max_new_tokens=1)
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0]


def wide_model() -> PreTrainedModel:
    """A model whose MLPs need most of the memory of a prompt."""
    config = CONFIGS["llama"]()
    config.intermediate_size, config.num_hidden_layers = 1024, 1
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("method", "length", "rows"), [("snapkv:budget=80,window=64", 4101, 64), ("h2o:budget=24", 2053, 2053)]
)
def test_scores_of_a_long_prompt_are_never_whole(method: str, length: int, rows: int, model: PreTrainedModel) -> None:
    """No tensor of the prompt's length squared or of observed queries times it."""
    heads = model.config.num_attention_heads
    sizes = Largest()
    with llm_accel.apply(model, parse(method)), sizes:
        model.generate(prompt(length), max_new_tokens=2)
    allowed = max(model.config.intermediate_size, model.config.hidden_size) * length  # what the model itself makes
    block = heads * min(rows, 128) * 2048  # what scores are computed for at once
    assert sizes.largest <= max(allowed, block) < heads * rows * length


class Largest(TensorBytes):
    """The largest tensor storage that an operation makes, in numbers of four bytes."""

    largest = 0

    def _add(self, storage: Any) -> None:
        self.largest = max(self.largest, storage.nbytes() // 4)
        super()._add(storage)
