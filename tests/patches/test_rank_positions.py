"""StreamingLLM with positions as ranks in the cache: equal to the kept tokens as a text of their own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llm_accel
from llm_accel import StreamingLLM, UnsupportedModelError
from llm_accel.patches.cache_name import CACHE
from tests.families.build import widened
from tests.families.shrink import tiny_config
from tests.patches.calls import logits_of
from tests.tiny import ATTENTION, CONFIGS, left_padded, prompt, tiny_model

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "glm4")
REFUSED = {"gemma2": "keep their own positions", "gemma3": "several rotary", "deepseek_v3": "latents"}


def one_layer(family: str) -> PreTrainedModel:
    """Keys and values of a single layer depend on nothing but their token and position."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_hidden_layers = 1
    config.initializer_range = 0.15
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION.get(family, "sdpa")).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", SUPPORTED)
def test_each_step_equals_the_kept_tokens_as_a_fresh_text(family: str) -> None:
    model, stream = one_layer(family), prompt(60)[0].tolist()
    config = StreamingLLM(budget=16, sinks=3, positions="cache")
    with llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        model(torch.tensor([stream[:20]]), past_key_values=cache)
        steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in stream[20:]]
    for seen, logits in zip(range(21, 61), steps, strict=True):
        kept = stream[:3] + stream[seen - 13 : seen]
        assert (model(torch.tensor([kept])).logits[0, -1] - logits).abs().max() <= 1e-4


@torch.no_grad()
def test_linear_attention_beside_it_has_no_positions_and_sees_the_whole_stream() -> None:
    config = tiny_config("qwen3_next", layer_types=["full_attention", "linear_attention"] * 2)
    torch.manual_seed(0)
    model, seen, stream = widened(AutoModelForCausalLM.from_config(config)), [], prompt(60)[0].tolist()
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output[0, -1]))
    with llm_accel.apply(model, StreamingLLM(budget=16, sinks=3, positions="cache")) as handle:
        seen.clear()
        cache = handle.new_cache()
        for tokens in (stream[:20], *([token] for token in stream[20:])):
            model(torch.tensor([tokens]), **{CACHE: cache})
    steps = seen[1:]
    seen.clear()
    for end in range(21, 61):
        model(torch.tensor([stream[:3] + stream[end - 13 : end]]))
    torch.testing.assert_close(torch.stack(steps), torch.stack(seen), atol=1e-4, rtol=1e-4)

    ids, mask = left_padded([40, 13])
    dense = logits_of(model, ids, mask)
    with llm_accel.apply(model, StreamingLLM(budget=64, positions="cache")):
        torch.testing.assert_close(logits_of(model, ids, mask), dense, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padded_rows_and_later_turns_count_their_own_ranks() -> None:
    model = one_layer("llama")
    ids, mask = left_padded([20, 9])
    config = StreamingLLM(budget=12, sinks=2, positions="cache")
    tail = prompt(5, seed=8, batch=2)
    with llm_accel.apply(model, config) as handle:
        cache = handle.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        for token in tail.split(1, dim=1):
            last = model(token, past_key_values=cache).logits[:, -1]
        turn = model(prompt(3, seed=9, batch=2), past_key_values=cache).logits[:, -1]
    for row, length in enumerate((20, 9)):
        whole = ids[row, 20 - length :].tolist() + tail[row].tolist()
        kept = whole if len(whole) <= 12 else whole[:2] + whole[-10:]
        assert (model(torch.tensor([kept])).logits[0, -1] - last[row]).abs().max() <= 1e-4
        later = kept + prompt(3, seed=9, batch=2)[row].tolist()
        assert (model(torch.tensor([later])).logits[0, -1] - turn[row]).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 7])
def test_until_something_is_evicted_it_equals_dense(chunk: int | None) -> None:
    model, ids = tiny_model("llama"), prompt(40)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = torch.stack(model.generate(ids, **options).logits)
    with llm_accel.apply(model, StreamingLLM(budget=64, positions="cache")):
        ours = torch.stack(model.generate(ids, prefill_chunk_size=chunk, **options).logits)
    assert (dense - ours).abs().max() <= 1e-4


@torch.no_grad()
def test_a_stream_of_ten_contexts_stays_inside_the_trained_positions() -> None:
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    positions = []
    model.model.rotary_emb.register_forward_hook(
        lambda m, args, kwargs, out: positions.append(
            int((kwargs.get("position_ids") if "position_ids" in kwargs else args[1]).max())
        ),
        with_kwargs=True,
    )
    with llm_accel.apply(model, StreamingLLM(budget=24, positions="cache")) as handle:
        out = model.generate(
            prompt(20), max_new_tokens=320, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert all(layer.physical_length == 24 for layer in handle.report().layers)
    assert max(positions) < 24
    assert torch.isfinite(torch.stack(out.logits)).all()


@pytest.mark.parametrize("family", REFUSED)
def test_models_whose_keys_cannot_be_turned_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        llm_accel.apply(tiny_model(family), StreamingLLM(budget=16, positions="cache"))
