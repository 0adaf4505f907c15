"""Engines that cannot do what they are asked fail at their start with the reason; everybody else's vLLM is left alone.
Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import logging
from types import SimpleNamespace

import pytest

from llm_accel import ConfigError, UnsupportedCallError
from llm_accel.common.bundled import vision_model_path
from tests.integrations.vllm import kit, tiny_vision
from tests.integrations.vllm.visual_kit import limits

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def config(method: str, architecture: str = "LlamaForCausalLM", **changes):
    """As much of vLLM's configuration as is asked for."""
    parts = {
        "model_config": SimpleNamespace(
            hf_overrides={"llm_accel": {"method": method}}, hf_config=None, architectures=[architecture]
        ),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, enable_dbo=False),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**parts | changes)


WRONG = {
    "speculative decoding": {"speculative_config": object()},
    "KV connector": {"kv_transfer_config": object()},
    "context parallelism": {"parallel_config": SimpleNamespace(decode_context_parallel_size=2)},
    "dual batch overlap": {"parallel_config": SimpleNamespace(enable_dbo=True)},
    "kv_cache_dtype=fp8": {"cache_config": SimpleNamespace(cache_dtype="fp8")},
}


@pytest.mark.parametrize("reason", WRONG)
def test_engines_in_which_kv_methods_would_be_wrong(monkeypatch, reason):
    from llm_accel.integrations.vllm import checks

    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: config("snapkv"))
    assert checks.check_engine("CPU_ATTN", takes_kv=True) is not None
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: config("snapkv", **WRONG[reason]))
    with pytest.raises(ConfigError, match=reason):
        checks.check_engine("CPU_ATTN", takes_kv=True)


@pytest.mark.parametrize("name", ["CPU_MLA", "FLASHINFER", "FLEX_ATTENTION", "TRITON_MLA"])
def test_every_other_backend_refuses_kv_methods_and_is_itself_without(monkeypatch, name):
    """Latent attention, and kernels whose pages we do not know, would run dense."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from llm_accel.integrations.vllm import backends, checks, register

    register()
    register()
    assert AttentionBackendEnum[name].get_path() == f"llm_accel.integrations.vllm.backends.{name}"
    try:
        backend = AttentionBackendEnum[name].get_class()
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")
    assert backend.get_name() == backend.__mro__[1].get_name()
    assert backend.get_impl_cls() is backend.__mro__[1].get_impl_cls()
    assert backend is getattr(backends, name)
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: config("snapkv"))
    with pytest.raises(ConfigError, match=rf"attention backend is {name}.*CPU_ATTN, FLASH_ATTN and TRITON_ATTN"):
        backend.get_impl_cls()


def test_a_visual_method_on_a_model_that_we_do_not_know(monkeypatch):
    from llm_accel.integrations.vllm import checks
    from llm_accel.integrations.vllm.visual import pruning

    found = config("stride_tokens", "Gemma3ForConditionalGeneration")
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: found)
    with pytest.raises(ConfigError, match="visual methods know LlavaForConditionalGeneration, LlavaNext"):
        checks.check_engine("CPU_ATTN", takes_kv=True)
    with pruning():
        assert checks.check_engine("CPU_ATTN", takes_kv=True) is not None
        found.ec_transfer_config = object()
        with pytest.raises(ConfigError, match="shared cache of encoder outputs"):
            checks.check_engine("CPU_ATTN", takes_kv=True)
        found.ec_transfer_config, found.lora_config = None, SimpleNamespace(enable_tower_connector_lora=True)
        with pytest.raises(ConfigError, match="LoRA in the tower"):
            checks.check_engine("CPU_ATTN", takes_kv=True)


def test_a_request_that_goes_on_after_its_prompt_was_compressed():
    from llm_accel.integrations.vllm.blocks import policy_of
    from llm_accel.integrations.vllm.scheduling import CompressedManager

    made = CompressedManager.__new__(CompressedManager)
    made._begins, made._prompts = {"a": 300}, {}
    made.kv_cache_spec = SimpleNamespace(method="snapkv", policy=policy_of("snapkv:budget=100", 32))
    made.remove_skipped_blocks("a", 250, 300)  # its last chunk is on the way
    assert made._prompts == {"a": 300}
    with pytest.raises(UnsupportedCallError, match="send it as a new request"):
        made.remove_skipped_blocks("a", 310, 400)


def test_worker_and_scheduler_agree_where_steps_are_in_flight():
    """The scheduler may hear of a step when later ones are planned; what counts is where each step begins."""
    from llm_accel.integrations.vllm.blocks import policy_of
    from llm_accel.integrations.vllm.scheduling import CompressedManager

    made = CompressedManager.__new__(CompressedManager)
    made._begins, made._prompts, made.freed = {"a": 300}, {}, 0
    made.kv_cache_spec = SimpleNamespace(policy=policy_of("random:budget=100", 32), page_size_bytes=1)
    made.block_pool, asked = SimpleNamespace(get_num_free_blocks=lambda: 0), []
    made._remove_blocks_in_range = lambda *given: asked.append(given)
    made.remove_skipped_blocks("a", 0, 300)  # planned: the first decode step, at 300; done: nothing
    made._begins["a"] = 302
    made.remove_skipped_blocks("a", 302, 300)  # done: two steps more
    assert made._prompts == {"a": 300} and asked == [("a", *made.kv_cache_spec.policy.gap(300, 302))]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("adakv", "one block table serves all heads"),
        ("snapkv:budget=40", "a budget here is at least 65"),
        ("stride_tokens", "this model is none of them"),
    ],
)
def test_an_engine_fails_at_its_start(method, reason):
    with pytest.raises(ConfigError, match=reason), kit.engine(method=method):
        pass


def test_prompts_with_features_in_place_of_an_image():
    import torch
    from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems

    from llm_accel.integrations.vllm.visual import check_items
    from llm_accel.methods import StrideTokens

    items = MultiModalDataItems({"image": ImageEmbeddingItems(torch.zeros(1, 4, 8), expected_hidden_size=8)})
    with pytest.raises(ValueError, match="Send the image itself"):
        check_items(StrideTokens(), items)
    check_items(None, items)


def test_missing_interfaces_turn_a_feature_off_and_name_what_is_missing(monkeypatch):
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from llm_accel.integrations.vllm import checks, compat, models

    assert {name: compat.problem(name) for name in compat.FEATURES} == dict.fromkeys(compat.FEATURES)
    monkeypatch.delattr(KVCacheSpecRegistry, "register")
    assert "KVCacheSpecRegistry.register is missing" in compat.problem("kv")
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: config("snapkv"))
    with pytest.raises(
        ConfigError, match=r"differs from what llm_accel knows.*KVCacheSpecRegistry\.register is missing"
    ):
        checks.check_engine("CPU_ATTN", takes_kv=True)
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    assert models.LlavaForConditionalGeneration is not LlavaForConditionalGeneration
    monkeypatch.setattr(LlavaForConditionalGeneration, "_image_pixels_to_features", lambda tower: None)
    assert "takes no vision_tower, pixel_values" in compat.problem("LlavaForConditionalGeneration")
    assert models.LlavaForConditionalGeneration is LlavaForConditionalGeneration


def test_another_version_needs_a_word_from_the_user_for_kv_methods(monkeypatch):
    import vllm

    from llm_accel.integrations.vllm import compat

    monkeypatch.delenv(compat.ANYWAY, raising=False)
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    assert f"outside of the tested range 0.29 to 0.32; {compat.ANYWAY}=1" in compat.problem("kv")
    assert compat.problem("LlavaForConditionalGeneration") is None
    monkeypatch.setenv(compat.ANYWAY, "1")
    assert compat.problem("kv") is None


def test_nothing_that_goes_wrong_here_stops_vllm(monkeypatch, caplog):
    from llm_accel.integrations import vllm as plugin
    from llm_accel.integrations.vllm import registration

    def broken() -> None:
        raise RuntimeError("another vLLM")

    monkeypatch.setattr(registration, "register_all", broken)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "engines run as without it" in caplog.text


def test_the_entry_point_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, llm_accel.integrations.vllm; print([one for one in ('torch', 'vllm') if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vllm" not in done.stdout


def test_layers_that_are_not_whole_are_refused(monkeypatch):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    from llm_accel.integrations.vllm import backends
    from llm_accel.integrations.vllm.scheduling import CompressedSpec, is_whole
    from llm_accel.integrations.vllm.steps import CompressedBuilder

    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = FullAttentionSpec(**shape)
    windows = [SlidingWindowSpec(**shape, sliding_window=64), FullAttentionSpec(**shape, sliding_window=64)]
    monkeypatch.setattr(backends.CPU_ATTN, "method", "snapkv:budget=100")
    assert is_whole(backends.CPU_ATTN.customize_spec(full))
    for spec in windows:
        with pytest.raises(ConfigError, match="a window, chunks or a state"):
            backends.CPU_ATTN.customize_spec(spec)
    state = MambaSpec(block_size=32, shapes=((2, 2),), dtypes=(torch.float32,))
    layers = {"a": SimpleNamespace(get_kv_cache_spec=lambda _config: state), "b": SimpleNamespace()}
    builder = CompressedBuilder.__new__(CompressedBuilder)
    builder.kv_cache_spec = CompressedSpec.of(full, "snapkv:budget=100")
    builder.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    with pytest.raises(ConfigError, match="a window, chunks or a state"):
        builder._check_layers()
    layers["a"].get_kv_cache_spec = lambda _config: full
    builder._check_layers()


def test_llava_of_features_that_we_cannot_prune(monkeypatch):
    """A tower method on features of several layers."""
    overrides = {"llm_accel": {"method": "flowcut"}, "vision_feature_layer": [-2, -3]}
    with (
        pytest.raises(ConfigError, match="several layers of the tower"),
        kit.engine(vision_model_path(), max_model_len=512, hf_overrides=overrides),
    ):
        pass


def test_a_tower_that_lets_patches_leave_before_padding_is_cut_off(tmp_path):
    """How many stay is then known too late; methods that do not look into the tower run."""
    folder = tiny_vision.save("llava_next", tmp_path)
    with (
        pytest.raises(ConfigError, match="how many are left is not known before"),
        kit.engine(folder, "flowcut", **limits("flowcut")),
    ):
        pass


@pytest.mark.parametrize("method", ["flowcut", "flowcut:llm_stage=off"])
def test_patches_do_not_leave_inside_a_tower_of_qwen(tmp_path, method):
    """Transformers lets them, so that tokens would differ."""
    folder = tiny_vision.save("qwen2_5_vl", tmp_path)
    with (
        pytest.raises(ConfigError, match="give tower_stage=behind,llm_stage=off"),
        kit.engine(folder, method, **limits(method)),
    ):
        pass


@pytest.mark.parametrize("method", ["flowcut", "flowcut:llm_stage=off,budget=5"])
def test_patches_do_not_leave_inside_a_tower_of_internvl(tmp_path, method):
    """The same."""
    folder = tiny_vision.save("internvl", tmp_path)
    with (
        pytest.raises(ConfigError, match="patches leave behind this tower; give tower_stage=behind"),
        kit.engine(folder, method, **limits(method)),
    ):
        pass
