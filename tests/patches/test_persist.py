"""A saved cache continues as if it had never left, and only on the model and method it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llm_accel
from llm_accel import ConfigError, UnsupportedCallError
from tests.contracts.matrix import METHODS, every_method, every_shape, generate, make_batch
from tests.tiny import FAMILIES, prompt, tiny_model


@torch.no_grad()
@every_shape
@every_method
def test_a_loaded_cache_continues_like_the_saved_one(method: str, shape: str, tmp_path: Path) -> None:
    model, batch = tiny_model("llama"), make_batch(shape, long=True)
    rows = batch.ids.shape[0]
    with llm_accel.apply(model, METHODS[method]()) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        handle.save_cache(cache, tmp_path / "cache.safetensors")
        loaded = handle.load_cache(tmp_path / "cache.safetensors")
        assert loaded.get_seq_length() == cache.get_seq_length()
        for seed in range(3):
            token = prompt(1, seed=seed, batch=rows)
            expected = model(token, past_key_values=cache).logits
            assert torch.equal(model(token, past_key_values=loaded).logits, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_saved(family: str, tmp_path: Path) -> None:
    model, batch = tiny_model(family), make_batch("padded", long=True)
    with llm_accel.apply(model, METHODS["snapkv"]()) as handle:
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        handle.save_cache(cache, tmp_path / "cache.safetensors")
        loaded = handle.load_cache(tmp_path / "cache.safetensors")
        token = prompt(1, batch=3)
        expected = model(token, past_key_values=cache).logits
        assert torch.equal(model(token, past_key_values=loaded).logits, expected)


def test_other_methods_models_and_files_are_refused(tmp_path: Path) -> None:
    model, batch, path = tiny_model("llama"), make_batch("single", long=True), tmp_path / "cache.safetensors"
    with llm_accel.apply(model, METHODS["snapkv"]()) as handle:
        with pytest.raises(UnsupportedCallError, match="empty"):
            handle.save_cache(handle.new_cache(), path)
        cache = handle.new_cache()
        generate(model, batch, past_key_values=cache)
        handle.save_cache(cache, path)
        with pytest.raises(ConfigError, match=r"nowhere\.safetensors"):
            handle.load_cache(tmp_path / "nowhere.safetensors")
        (tmp_path / "text").write_text("no tensors")
        with pytest.raises(ConfigError, match="cannot be read"):
            handle.load_cache(tmp_path / "text")
    with llm_accel.apply(model, METHODS["snapkv"](budget=25)) as handle:
        with pytest.raises(ConfigError, match=r"budget=24.*budget=25"):
            handle.load_cache(path)
        with pytest.raises(UnsupportedCallError, match="not filled with"):
            handle.save_cache(cache, path)
    for other, word in ((tiny_model("llama", seed=9), "weights"), (tiny_model("qwen2"), "config")):
        with (
            llm_accel.apply(other, METHODS["snapkv"]()) as handle,
            pytest.raises(ConfigError, match=rf"another model.*{word}"),
        ):
            handle.load_cache(path)
