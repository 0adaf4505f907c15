"""decode="compiled": the numbers of eager decoding from one graph, whatever the prompt, and caches that stay usable."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import llm_accel
from llm_accel import ConfigError, Dense, UnsupportedModelError
from llm_accel.cache.fixed import FixedForm
from llm_accel.patches.compiled import cache as graph_cache
from llm_accel.patches.compiled import call, pool
from llm_accel.patches.hook import DecoderHook
from llm_accel.registry import parse, parse_all
from tests.patches.calls import Outside
from tests.patches.conftest import Counting
from tests.tiny import left_padded, prompt, tiny_model

pytestmark = pytest.mark.usefixtures("counting")
CLOSE = 1e-5
NEW = 10
SNAPKV = "snapkv:budget=24,window=8"
METHODS = (
    SNAPKV,
    "h2o:budget=24",
    "streaming_llm:budget=24",
    "adakv:budget=24,window=8,page=8",
    "pyramidkv:budget=24,window=8,beta=2,kernel=5",
    "retrieval_heads:head_list=0.0+1.1,recent=16,sinks=4,full_budget=40",
)


def layers_of(method: str) -> int:
    """One layer shows all, but for methods that treat layers, or heads of layers, differently."""
    return 2 if method in METHODS[-2:] else 1


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for what the device has computed: to read a number, or the size of a result."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = ("index", "index_put", "index_put_")
        masked = name in by_mask and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert name not in self.WAITING and not masked, func
        return func(*args, **(kwargs or {}))


def shallow(family: str = "llama", layers: int = 1) -> PreTrainedModel:
    """Few layers: each of them is traced."""
    model = tiny_model(family)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    return model


def generate(model: PreTrainedModel, lengths: list[int], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of greedy decoding after a left-padded batch."""
    ids, mask = (given.to(model.device) for given in left_padded(lengths))
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, **(options | more))
    return output.sequences, torch.stack(output.logits, dim=1)


def check_equal(ours: tuple[torch.Tensor, torch.Tensor], eager: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(ours[0], eager[0])
    assert (ours[1] - eager[1]).abs().max() <= CLOSE


def pair(method: str, family: str = "llama", layers: int = 1) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice: decoding eagerly, and compiled."""
    eager, compiled = shallow(family, layers), shallow(family, layers)
    llm_accel.apply(eager, parse_all(method))
    llm_accel.apply(compiled, parse_all(method), decode="compiled")
    return eager, compiled


def handle_of(model: PreTrainedModel) -> llm_accel.Handle:
    return llm_accel.Handle(model, model.generate.hook)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager_in_one_graph(method: str, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(method, layers=layers_of(method))
    for lengths in ([60, 41], [90, 70], [60, 33], [90, 90]):
        check_equal(generate(compiled, lengths), generate(eager, lengths))
        for ours, other in zip(handle_of(compiled).report().layers, handle_of(eager).report().layers, strict=True):
            assert ours.physical_length == other.physical_length < ours.logical_length == other.logical_length
            assert ours.kv_bytes <= other.kv_bytes and ours.evicted == other.evicted > 0
    assert counting.graphs == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert handle_of(compiled).report().backends["decode steps"][0] == "compiled"
    check_steps_wait_for_nothing(compiled, counting, monkeypatch)


def check_steps_wait_for_nothing(model: PreTrainedModel, counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the graph nor what is done before it makes the host wait. Nothing compiles where a mode is active, so it
    is switched on for each of them."""

    def watched(*args: Any) -> Any:
        with NoWaiting():
            return hook(*args)

    ids, mask = left_padded([60, 41])
    cache, token, hook = handle_of(model).new_cache(), torch.tensor([[5], [6]]), DecoderHook.__call__
    model(ids, attention_mask=mask, past_key_values=cache)
    runs = counting.runs
    counting.within = NoWaiting
    monkeypatch.setattr(DecoderHook, "__call__", watched)
    for _ in range(2):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        model(token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache)
    assert counting.runs == runs + 2


def test_dense_is_one_graph_up_to_its_capacity(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, compiled = shallow(), shallow()
    handle = llm_accel.apply(compiled, Dense(capacity=200), decode="compiled")
    for lengths in ([60, 41], [90, 70], [130, 33], [17, 12]):
        check_equal(generate(compiled, lengths), generate(dense, lengths))
    assert counting.graphs == 1 and not torch._dynamo.utils.counters["graph_break"]
    report = handle.report()
    assert report.kv_bytes == report.dense_kv_bytes and report.backends["decode steps"][0] == "compiled"
    options = {"max_new_tokens": NEW, "do_sample": False}
    looked_up = compiled.generate(prompt(60), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(looked_up, dense.generate(prompt(60), **options))
    check_steps_wait_for_nothing(compiled, counting, monkeypatch)


def test_dense_without_capacity_has_a_graph_for_each_bucket(counting: Counting) -> None:
    dense, compiled = shallow(), shallow()
    llm_accel.apply(compiled, "dense", decode="compiled")
    for lengths, graphs in (([60, 41], 1), ([33, 20], 1), ([90, 70], 2), ([128, 5], 2)):
        check_equal(generate(compiled, lengths, max_new_tokens=3), generate(dense, lengths, max_new_tokens=3))
        assert counting.graphs == graphs


@pytest.mark.parametrize("method", [SNAPKV, "h2o:budget=24", "streaming_llm:budget=24"])
def test_a_short_prompt_grows_through_its_budget(method: str, counting: Counting) -> None:
    eager, compiled = pair(method)
    check_equal(generate(compiled, [17, 12], max_new_tokens=14), generate(eager, [17, 12], max_new_tokens=14))
    check_equal(generate(compiled, [60, 41], max_new_tokens=14), generate(eager, [60, 41], max_new_tokens=14))
    assert counting.graphs == 1


@pytest.mark.parametrize(
    ("family", "method"), [("qwen3", SNAPKV), ("phi3", "random:budget=24,window=8"), ("deepseek_v3", SNAPKV)]
)
def test_other_families(family: str, method: str) -> None:
    eager, compiled = pair(method, family)
    check_equal(generate(compiled, [40, 31], max_new_tokens=4), generate(eager, [40, 31], max_new_tokens=4))


@pytest.mark.parametrize("method", [SNAPKV, "h2o:budget=24", "adakv:budget=24,window=8,page=8"])
def test_a_cache_serves_several_turns_and_may_be_looked_at_between_steps(method: str) -> None:
    """Whoever looks at a layer finds its entries there, and decoding goes on as if nobody had looked."""
    answers = []
    for model in pair(method):
        cache, logits = handle_of(model).new_cache(), []
        for turn, length in enumerate((50, 7)):
            logits.append(model(prompt(length, seed=turn), past_key_values=cache).logits[:, -1])
            for step in range(4):
                logits.append(model(torch.tensor([[step + 5]]), past_key_values=cache).logits[:, -1])
                if step == 1:
                    cache.layers[0].kept_positions()
                    held = [layer.physical_length() for layer in cache.layers]
                    cache = copy.deepcopy(cache)
        answers.append((torch.stack(logits), held, [layer.physical_length() for layer in cache.layers]))
    (eager, *lengths), (compiled, *ours) = answers
    assert (eager - compiled).abs().max() <= CLOSE and lengths == ours


def test_buffers_grow_when_more_is_decoded_than_was_said(monkeypatch: pytest.MonkeyPatch, counting: Counting) -> None:
    monkeypatch.setattr(graph_cache, "HEADROOM", 64)
    logits = []
    for model in pair(SNAPKV):
        cache = handle_of(model).new_cache()
        model(prompt(40), past_key_values=cache)
        for step in range(70):
            output = model(torch.tensor([[step + 5]]), past_key_values=cache)
        assert cache.layers[0].physical_length() == 24 + 70
        logits.append(output.logits)
    assert (logits[0] - logits[1]).abs().max() <= CLOSE and counting.graphs == 2


@pytest.mark.parametrize("method", [SNAPKV, "h2o:budget=24", "adakv:budget=24,window=8,page=8"])
def test_prompts_read_ahead_and_chunked_mlps(method: str, counting: Counting) -> None:
    answers = []
    for decode in ("eager", "compiled"):
        model = shallow()
        handle = llm_accel.apply(model, parse(method), mlp_chunk=16, decode=decode)
        for lengths in ([60, 41], [90, 70]):
            cache = handle.prefill(*left_padded(lengths), rows=1)
            options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True}
            output = model.generate(**cache.inputs, return_dict_in_generate=True, **options)
            answers.append((output.sequences, torch.stack(output.logits, dim=1)))
    for ours, eager in zip(answers[2:], answers[:2], strict=True):
        check_equal(ours, eager)
    assert counting.graphs == 1 and not torch._dynamo.utils.counters["graph_break"]


def test_traced_positions_follow(counting: Counting) -> None:
    kept = []
    for decode in ("eager", "compiled"):
        model = shallow()
        handle = llm_accel.apply(model, parse(SNAPKV), trace=True, decode=decode)
        cache = handle.new_cache()
        generate(model, [60, 41], past_key_values=cache)
        kept.append([layer.positions for layer in cache.layers])
    assert all(torch.equal(ours, eager) for ours, eager in zip(*kept, strict=True))


def test_two_threads_at_once() -> None:
    eager, compiled = pair("h2o:budget=24")
    batches = ([60, 41], [90, 70])
    expected = [generate(eager, lengths) for lengths in batches]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = [generate(compiled, batches[index]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answers in found.items():
        for answer in answers:
            check_equal(answer, expected[index])
    assert len(found) == 2


def test_what_the_compiler_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "backend", lambda: "inductor")
    eager, compiled = pair("h2o:budget=24")
    check_equal(generate(compiled, [60, 41], max_new_tokens=4), generate(eager, [60, 41], max_new_tokens=4))


def test_copies_and_pickles_compile_and_removal_leaves_nothing(counting: Counting) -> None:
    model = shallow()
    before, dense = Outside.of(model), generate(model, [60, 41])
    handle = llm_accel.apply(model, parse(SNAPKV), decode="compiled")
    expected = generate(model, [60, 41])
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        graphs = counting.graphs
        check_equal(generate(other, [60, 41]), expected)
        assert counting.graphs == graphs + 1
        with torch.no_grad():
            other.model.norm.weight.mul_(2.0)
        assert not torch.equal(generate(other, [60, 41])[1], expected[1])  # its own weights, not those of the original
    check_equal(generate(model, [60, 41]), expected)
    handle.remove()
    after = Outside.of(model)
    assert (after.hooks, after.attributes, after.config) == (before.hooks, before.attributes, before.config)
    assert torch.equal(generate(model, [60, 41])[1], dense[1])


def test_calls_that_cannot_be_compiled_are_eager_and_say_so(counting: Counting) -> None:
    eager, compiled = pair(SNAPKV)
    reasons = []
    for more in ({"num_beams": 2, "output_logits": False}, {"output_hidden_states": True}):
        calls = [
            model.generate(prompt(40), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **more)
            for model in (compiled, eager)
        ]
        assert torch.equal(calls[0].sequences, calls[1].sequences)
        reasons.append(handle_of(compiled).report().backends["decode steps"])
    with handle_of(compiled).disabled():
        compiled.generate(prompt(40), max_new_tokens=4, do_sample=False)
    assert counting.graphs == 0
    assert [said[0] for said in reasons] == ["eager", "eager"]
    assert "beam" in reasons[0][1] and "output_hidden_states" in reasons[1][1]


def test_auto_goes_on_without_a_compiler_and_compiled_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(call, "backend", lambda: broken)
    eager, compiled = pair(SNAPKV)
    with pytest.raises(UnsupportedModelError, match="no compiler here"):
        generate(compiled, [60, 41])
    plan = compiled.generate.hook.plan
    object.__setattr__(plan, "decode", "auto")  # as on a GPU; the plan is this model's alone
    check_equal(generate(compiled, [60, 41]), generate(eager, [60, 41]))
    backend, reason = handle_of(compiled).report().backends["decode steps"]
    assert backend == "eager" and "no compiler here" in reason


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("out of memory, say")


def test_a_first_step_that_fails_costs_auto_nothing(monkeypatch: pytest.MonkeyPatch, counting: Counting) -> None:
    """The layers keep their entries until a graph has run once, so that eager decoding can go on with them."""
    eager, compiled = pair(SNAPKV)
    object.__setattr__(compiled.generate.hook.plan, "decode", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(call.DecodeCall, "_compiled", lambda *_: out_of_memory)
        check_equal(generate(compiled, [60, 41]), generate(eager, [60, 41]))
    backend, reason = handle_of(compiled).report().backends["decode steps"]
    assert backend == "eager" and "first step failed with OutOfMemoryError" in reason and counting.graphs == 0
    check_equal(generate(compiled, [60, 41]), generate(eager, [60, 41]))
    assert handle_of(compiled).report().backends["decode steps"][0] == "compiled" and counting.graphs == 1


def test_unused_buffers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE", 100)
    kept = pool.Pool()

    def take(name: str, floats: int = 15) -> pool.Buffers:
        buffers = kept.take(name)
        buffers.form(0, lambda: FixedForm({"keys": torch.zeros(floats)}))
        return buffers

    taken = {name: take(name) for name in "abc"}
    for buffers in taken.values():
        kept.put(buffers)
    assert len({buffers.kind for buffers in taken.values()}) == 3 and buffers.nbytes == 60
    assert take("a") is not taken["a"]
    assert take("b") is taken["b"] and take("c") is taken["c"]
    assert take("b") is not taken["b"]
    large = take("large", 30)
    kept.put(large)
    assert large.nbytes == 120 and take("large", 30) is not large


def test_a_step_that_fails_half_way_is_found_out(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(SNAPKV)
    cache = handle_of(model).new_cache()
    model(prompt(40), past_key_values=cache)
    model(torch.tensor([[5]]), past_key_values=cache)
    with monkeypatch.context() as patch:
        patch.setattr(model.model._compiled_call_impl, "_compiled", lambda *_: out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(torch.tensor([[6]]), past_key_values=cache)
    with pytest.raises(llm_accel.UnsupportedCallError, match="half-way"):
        model(torch.tensor([[6]]), past_key_values=cache)
    assert generate(model, [60, 41])[0].shape == (2, 60 + NEW)


@pytest.mark.parametrize(
    ("method", "family", "says"),
    [
        ("h2o:ratio=0.5", "llama", "give budget"),
        ("h2o:budget=24,semantics=sim", "llama", "hidden"),
        ("streaming_llm:budget=24,positions=cache", "llama", "ranks"),
        ("snapkv:budget=24,window=8,recompress_every=8", "llama", "between steps"),
        (SNAPKV, "gemma3", "DynamicSlidingWindowLayer"),
    ],
)
def test_what_cannot_be_one_graph_is_refused_and_auto_stays_eager(method: str, family: str, says: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ConfigError, match=says):
        llm_accel.apply(model, parse(method), decode="compiled")
    handle = llm_accel.apply(model, parse(method), decode="auto")
    backend, reason = handle.report().backends["decode steps"]
    assert backend == "eager" and says in reason and "_compiled_call_impl" not in model.model.__dict__


def test_auto_is_eager_on_a_processor_and_unknown_ways_are_refused(model: PreTrainedModel) -> None:
    with llm_accel.apply(model, parse(SNAPKV), decode="auto") as handle:
        assert handle.report().backends["decode steps"] == ("eager", "auto compiles on GPUs only")
    with pytest.raises(ConfigError, match="'eager', 'compiled' or 'auto'"):
        llm_accel.apply(model, parse(SNAPKV), decode="fast")
    assert "decode steps" not in llm_accel.apply(model, parse(SNAPKV)).report().backends
