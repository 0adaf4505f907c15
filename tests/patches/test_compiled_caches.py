"""Caches between compiled steps: other calls, reads and failures find what they find in eager decoding."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import llm_accel
from llm_accel import UnsupportedCallError
from llm_accel.cache.layer import AccelLayer
from llm_accel.patches.cache_name import CACHE
from llm_accel.patches.compiled.cache import GraphCache
from llm_accel.registry import parse_all
from tests.patches.conftest import Counting
from tests.patches.test_compiled_decode import CLOSE, SNAPKV, handle_of, pair, shallow
from tests.patches.test_compiled_hip import SMALL
from tests.tiny import left_padded, prompt

pytestmark = pytest.mark.usefixtures("counting")
STEPS = 2


def token(number: int) -> torch.Tensor:
    return torch.tensor([[number]])


def begun(model: Any, length: int = 40) -> Any:
    """A cache after a prompt and some steps."""
    cache = handle_of(model).new_cache()
    model(prompt(length), **{CACHE: cache})
    for step in range(STEPS):
        model(token(step + 5), **{CACHE: cache})
    return cache


def gone_on(model: Any, cache: Any) -> torch.Tensor:
    """Logits of three more steps."""
    return torch.stack([model(token(step + 9), **{CACHE: cache}).logits for step in range(3)])


def check_as_eager(go_on: Callable[[Any, Any], torch.Tensor]) -> None:
    expected, found = (go_on(model, begun(model)) for model in pair(SNAPKV))
    assert (expected - found).abs().max() <= CLOSE


def test_without_the_plug_in_a_cache_is_refused_between_compiled_steps_too() -> None:
    for model in pair(SNAPKV):
        cache = begun(model)
        llm_accel.remove(model)
        with pytest.raises(UnsupportedCallError, match="this call runs without it"):
            model(token(9), **{CACHE: cache})


def test_a_cache_goes_on_where_the_same_method_was_applied_anew(counting: Counting) -> None:
    def go_on(model: Any, cache: Any) -> torch.Tensor:
        decode = model.generate.hook.plan.decode
        model(token(7), **{CACHE: cache})
        llm_accel.remove(model)
        llm_accel.apply(model, parse_all(SNAPKV), decode=decode)
        before = counting.runs
        logits = gone_on(model, cache)
        assert (counting.runs == before + 3) == (decode == "compiled")
        return logits

    check_as_eager(go_on)


@pytest.mark.parametrize("method", [SNAPKV, "h2o:budget=24", "adakv:budget=24,window=8,page=8"])
def test_steps_in_inference_mode_leave_a_cache_to_eager_calls_outside_of_it(method: str) -> None:
    """Compiled steps look at no tensor of their layers, and so not at those that belong to inference mode either."""
    ids, mask = left_padded([40, 31])
    found = []

    def step(model: Any, cache: Any, count: int) -> torch.Tensor:
        seen = torch.cat([mask, mask.new_ones(2, count)], dim=1)
        place = seen.sum(1, keepdim=True) - 1
        given: dict[str, Any] = {CACHE: cache, "attention_mask": seen, "position_ids": place}
        return model(token(count + 5).expand(2, 1), **given).logits

    for model in pair(method):
        cache = handle_of(model).new_cache()
        with torch.inference_mode():
            model(ids, attention_mask=mask, **{CACHE: cache})
            step(model, cache, 1)
            step(model, cache, 2)
        llm_accel.remove(model)
        llm_accel.apply(model, parse_all(method), decode="eager")
        found.append(step(model, cache, 3))
        held = [value for value in vars(cache.layers[0]).values() if isinstance(value, torch.Tensor)]
        assert held and not any(tensor.is_inference() for tensor in held)
    assert (found[0] - found[1]).abs().max() <= CLOSE


def test_a_cache_goes_on_with_a_copy_of_its_model() -> None:
    check_as_eager(lambda model, cache: gone_on(copy.deepcopy(model), cache))


def test_a_decoder_may_be_called_by_position() -> None:
    def go_on(model: Any, cache: Any) -> torch.Tensor:
        first = model.get_decoder()(token(9), **{CACHE: cache}).last_hidden_state
        return torch.cat([first, model.get_decoder()(token(9), **{CACHE: cache}).last_hidden_state])

    check_as_eager(go_on)


def test_hooks_that_come_between_steps_are_called(counting: Counting) -> None:
    """A compiled graph would go on without a hook that came later, and with one that has gone."""

    def go_on(model: Any, cache: Any) -> torch.Tensor:
        plain = gone_on(model, cache)
        mlp = model.get_decoder().layers[0].mlp
        handle = mlp.register_forward_hook(lambda module, args, output: output * 0.0)
        hooked = gone_on(model, cache)
        handle.remove()
        return torch.cat([plain, hooked, gone_on(model, cache)])

    check_as_eager(go_on)
    assert counting.runs == STEPS + 6


def test_nothing_that_an_earlier_cache_held_comes_back() -> None:
    """What is hidden has weight zero, which does not help against entries that are not numbers."""
    models: tuple[Any, Any] = pair(SNAPKV, layers=2)
    eager, compiled = models
    expected = gone_on(eager, begun(eager))
    cache = handle_of(compiled).new_cache()
    compiled(inputs_embeds=compiled.get_input_embeddings()(prompt(40)) * float("nan"), **{CACHE: cache})
    assert gone_on(compiled, cache).isnan().all() and gone_on(compiled, cache).isnan().all()
    compiled(prompt(3), **{CACHE: cache})  # an eager call: the buffers are free
    assert (gone_on(compiled, begun(compiled)) - expected).abs().max() <= CLOSE


def test_what_the_host_counts_is_right_whenever_it_is_read() -> None:
    held = []
    for decode in ("eager", "compiled"):
        model: Any = shallow()
        llm_accel.apply(model, parse_all(SNAPKV), trace=True, decode=decode)
        held.append(begun(model).layers[0].positions)
    assert torch.equal(*held) and held[0].shape[-1] == 24 + STEPS
    assert len({begun(model, 150).layers[0].sparse_calls for model in pair(SMALL)}) == 1


@contextmanager
def failing(kind: type[Any], name: str, at: int, error: BaseException, after: bool = False) -> Iterator[None]:
    """The ``at``-th call of a method fails, before it does anything or ``after`` it did it."""
    whole, calls = getattr(kind, name), 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise error
        result = whole(*args)
        if calls == at:
            raise error
        return result

    setattr(kind, name, fail)
    try:
        yield
    finally:
        setattr(kind, name, whole)


def test_no_memory_for_the_buffers_of_the_second_layer_costs_auto_nothing() -> None:
    models: tuple[Any, Any] = pair(SNAPKV, layers=2)
    eager, compiled = models
    object.__setattr__(compiled.generate.hook.plan, "decode", "auto")
    caches = [handle_of(model).new_cache() for model in (eager, compiled)]
    for model, cache in zip((eager, compiled), caches, strict=True):
        model(prompt(40), **{CACHE: cache})
    with failing(AccelLayer, "_put", 2, torch.OutOfMemoryError("no memory")):
        found = compiled(token(9), **{CACHE: caches[1]}).logits
    assert torch.equal(found, eager(token(9), **{CACHE: caches[0]}).logits)
    assert torch.equal(gone_on(compiled, caches[1]), gone_on(eager, caches[0]))


def test_no_memory_to_end_the_fixed_form_loses_nothing() -> None:
    def go_on(model: Any, cache: Any) -> torch.Tensor:
        with failing(AccelLayer, "_take_back", 1, torch.OutOfMemoryError("no memory")):
            try:
                cache.crop(-1)
            except torch.OutOfMemoryError:
                cache.crop(-1)
        return gone_on(model, cache)

    check_as_eager(go_on)


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_once_the_graph_has_run_is_found_out(after: bool) -> None:
    model: Any = pair(SNAPKV, layers=2)[1]
    cache = begun(model)
    with failing(GraphCache, "advance", 1, KeyboardInterrupt(), after), pytest.raises(KeyboardInterrupt):
        model(token(9), **{CACHE: cache})
    with pytest.raises(UnsupportedCallError, match="half-way"):
        model(token(9), **{CACHE: cache})


def test_a_report_in_another_thread_waits_for_the_step(counting: Counting) -> None:
    def go_on(model: Any, cache: Any) -> torch.Tensor:
        reports: list[Any] = []
        thread = threading.Thread(target=lambda: reports.append(handle_of(model).report()))

        @contextmanager
        def meanwhile() -> Iterator[None]:
            if not thread.ident:
                thread.start()
                time.sleep(0.2)
            yield

        counting.within = meanwhile
        logits = gone_on(model, cache)
        if thread.ident:
            thread.join()
            assert [layer.physical_length for layer in reports[0].layers] >= [24 + STEPS]
        return logits

    check_as_eager(go_on)


def test_a_report_leaves_no_second_copy_of_the_cache() -> None:
    model: Any = pair(SNAPKV)[1]
    cache: Any = begun(model)
    assert cache.llm_accel.graph is not None
    handle_of(model).report()
    assert cache.llm_accel.graph is None


@pytest.mark.parametrize("method", [SNAPKV, "adakv:budget=24,window=8,page=8", "retrieval_heads:head_list=0.0"])
def test_a_batch_of_another_size_is_refused(method: str) -> None:
    for model in pair(method):
        cache = begun(model)
        with pytest.raises(UnsupportedCallError, match="the call has 2 rows and this cache 1"):
            model(torch.cat([token(9), token(9)]), **{CACHE: cache})
        assert gone_on(model, cache).isfinite().all()
