"""The life of a plugged-in model: copied, saved, loaded, shared, run from threads, interrupted, unplugged."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llm_accel
from llm_accel import AlreadyAppliedError
from tests.patches.calls import BUDGET, IDS, MASK, NEW, Outside, failing_once, logits_of, snapkv
from tests.tiny import CONFIGS, prompt, tiny_model


def test_remove_is_exact(model: PreTrainedModel) -> None:
    before, dense = Outside.of(model), logits_of(model)
    handle = snapkv(model)
    assert Outside.of(model) != before
    assert not torch.equal(logits_of(model), dense)
    handle.remove()
    assert Outside.of(model) == before
    assert torch.equal(logits_of(model), dense)


def test_remove_twice_and_from_a_stock_model(model: PreTrainedModel) -> None:
    llm_accel.remove(model)
    handle = snapkv(model)
    llm_accel.remove(model)
    llm_accel.remove(model)
    handle.remove()
    assert "generate" not in model.__dict__


def test_an_old_handle_does_not_remove_a_new_plugin(model: PreTrainedModel) -> None:
    old = snapkv(model)
    old.remove()
    new = snapkv(model)
    old.remove()
    assert new.config.budget == BUDGET
    assert "generate" in model.__dict__


def test_hooks_of_others_stay(model: PreTrainedModel) -> None:
    calls: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: calls.append("first"))
    handle = snapkv(model)
    model.model.register_forward_hook(lambda *_: calls.append("second"))
    handle.remove()
    model(prompt(5))
    assert calls == ["first", "second"]


def test_handle_is_a_context_manager(model: PreTrainedModel) -> None:
    dense = logits_of(model)
    with pytest.raises(ZeroDivisionError), snapkv(model):
        _ = 1 / 0
    assert "generate" not in model.__dict__
    assert torch.equal(logits_of(model), dense)


def test_disabled_runs_dense_and_comes_back(model: PreTrainedModel) -> None:
    dense, forward = logits_of(model), model(IDS, attention_mask=MASK).logits
    handle = snapkv(model)
    ours = logits_of(model)
    with handle.disabled(), handle.disabled():
        assert torch.equal(logits_of(model), dense)
        assert torch.equal(model(IDS, attention_mask=MASK).logits, forward)
    assert torch.equal(logits_of(model), ours)
    with pytest.raises(ZeroDivisionError), handle.disabled():
        _ = 1 / 0
    assert torch.equal(logits_of(model), ours)


def test_nested_apply_is_refused_and_changes_nothing(model: PreTrainedModel) -> None:
    snapkv(model)
    before, ours = Outside.of(model), logits_of(model)
    for method in ("snapkv", "random"):
        with pytest.raises(AlreadyAppliedError, match=r"snapkv:budget=24,window=8.*remove"):
            llm_accel.apply(model, method)
    assert Outside.of(model) == before
    assert torch.equal(logits_of(model), ours)


def test_taking_it_off_the_decoder_alone_leaves_a_dense_model(model: PreTrainedModel) -> None:
    before, dense = Outside.of(model), logits_of(model)
    snapkv(model)
    llm_accel.remove(model.model)
    assert torch.equal(logits_of(model), dense)
    llm_accel.remove(model)
    assert Outside.of(model) == before


def test_deepcopy_is_accelerated_with_its_own_weights(model: PreTrainedModel) -> None:
    dense = logits_of(model)
    handle = snapkv(model)
    ours = logits_of(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), ours)
    twin.lm_head.weight.data.zero_()
    assert torch.equal(logits_of(twin), torch.zeros_like(ours))
    assert torch.equal(logits_of(model), ours)
    handle.remove()
    assert torch.equal(logits_of(model), dense)
    twin.lm_head.weight.data.copy_(model.lm_head.weight.data)
    assert torch.equal(logits_of(twin), ours)
    llm_accel.remove(twin)
    assert torch.equal(logits_of(twin), dense)


def test_pickled_model_stays_accelerated(model: PreTrainedModel) -> None:
    snapkv(model)
    ours, file = logits_of(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits_of(loaded), ours)
    llm_accel.remove(loaded)
    assert "generate" in model.__dict__
    assert torch.equal(logits_of(model), ours)


def test_pickled_model_is_accelerated_in_another_process(model: PreTrainedModel, tmp_path: Path) -> None:
    dense = logits_of(model)
    snapkv(model)
    torch.save({"model": model, "ids": IDS, "mask": MASK, "ours": logits_of(model), "dense": dense}, tmp_path / "all")
    script = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "model = saved['model']\n"
        "options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)\n"
        "run = lambda: torch.stack(model.generate(saved['ids'], attention_mask=saved['mask'], **options).logits, 1)\n"
        "assert torch.equal(run(), saved['ours'])\n"
        "import llm_accel\n"
        "llm_accel.remove(model)\n"
        "assert torch.equal(run(), saved['dense'])\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "all")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_clean(model: PreTrainedModel, tmp_path: Path) -> None:
    dense = logits_of(model)
    snapkv(model)
    model.save_pretrained(tmp_path)
    assert all("accel" not in path.read_text() for path in tmp_path.glob("*.json"))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(loaded), dense)


def test_models_in_one_process_do_not_meet(model: PreTrainedModel) -> None:
    other, stock = tiny_model("qwen3"), tiny_model("llama")
    dense = logits_of(stock)
    handles = snapkv(model), snapkv(other, budget=30)
    ours = logits_of(model), logits_of(other)
    for _ in range(2):
        assert torch.equal(logits_of(stock), dense)
        assert torch.equal(logits_of(model), ours[0])
        assert torch.equal(logits_of(other), ours[1])
    lengths = [handle.report().layers[0].physical_length - NEW + 1 for handle in handles]
    assert lengths == [BUDGET, 30]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_configuration_object(order: tuple[int, int]) -> None:
    config = CONFIGS["llama"]()
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    for one in models:
        one.config = one.model.config = config
    before, dense = Outside.of(models[0]), [logits_of(one) for one in models]
    handles = [snapkv(models[0]), snapkv(models[1], budget=30)]
    ours = [logits_of(one) for one in models]
    first, second = order
    handles[first].remove()
    assert torch.equal(logits_of(models[first]), dense[first])
    assert torch.equal(logits_of(models[second]), ours[second])
    assert torch.equal(logits_of(models[first]), dense[first])
    handles[second].remove()
    assert all(torch.equal(logits_of(one), logits) for one, logits in zip(models, dense, strict=True))
    assert Outside.of(models[0]) == Outside.of(models[1]) == before


def test_threads_on_one_model_and_a_stock_one(model: PreTrainedModel) -> None:
    stock = tiny_model("llama", seed=4)
    prompts = [prompt(50 + 5 * index, seed=index) for index in range(6)]
    snapkv(model)
    expected = [(logits_of(model, ids, None), logits_of(stock, ids, None)) for ids in prompts]

    def work(index: int) -> bool:
        ids, (ours, dense) = prompts[index], expected[index]
        return all(
            torch.equal(logits_of(model, ids, None), ours) and torch.equal(logits_of(stock, ids, None), dense)
            for _ in range(3)
        )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_failing_call_leaves_the_model_as_it_was(model: PreTrainedModel, layer: int, part: str) -> None:
    handle = snapkv(model)
    ours, cache = logits_of(model), handle.new_cache()
    with failing_once(getattr(model.model.layers[layer], part)):
        logits_of(model, past_key_values=cache)
    assert torch.equal(logits_of(model), ours)
    cache.reset()
    assert torch.equal(logits_of(model, past_key_values=cache), ours)


def test_a_then_b_then_a(model: PreTrainedModel) -> None:
    snapkv(model)
    first = logits_of(model)
    logits_of(model, prompt(90, seed=9), None)
    logits_of(model, prompt(5, seed=9), None)
    assert torch.equal(logits_of(model), first)


def test_training_steps_pass_through(model: PreTrainedModel) -> None:
    dense = model.train()(IDS, labels=IDS).loss
    snapkv(model)
    with torch.enable_grad():
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    assert torch.equal(loss, dense)
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
