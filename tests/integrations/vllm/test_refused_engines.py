"""What an engine is refused for when its model, its layers or its pages are looked at: on as much of each as the check
reads. Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_accel import ConfigError
from llm_accel.registry import parse

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
FULL = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}


def config(method: str, **changes):
    """As much of vLLM's configuration as models look at."""
    parts = {
        "model_config": SimpleNamespace(hf_overrides={"llm_accel": {"method": method}}, hf_config=None),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "compilation_config": SimpleNamespace(compile_mm_encoder=False),
        "speculative_config": None,
    }
    return SimpleNamespace(**parts | changes)


def of(kind: type[nn.Module]) -> nn.Module:
    """A module of a class, without what its constructor would load."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


# --- layers and pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"kv_sharing_target_layer_name": "model.layers.3"}, "read the entries of others would find them moved"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi counts distances"),
    ],
)
def test_layers_whose_entries_cannot_move(wrong, reason):
    from llm_accel.integrations.vllm.layer import _check_layer

    usual = {"kv": parse("snapkv"), "kv_sharing_target_layer_name": None, "alibi_slopes": None}
    _check_layer(SimpleNamespace(**usual))
    with pytest.raises(ConfigError, match=reason):
        _check_layer(SimpleNamespace(**usual | wrong))


@pytest.mark.parametrize("isa", ["vec", "amx", "neon"])
def test_pages_that_the_cpu_packs_for_its_instructions(isa, monkeypatch):
    from llm_accel.integrations.vllm import backends
    from llm_accel.integrations.vllm.steps import CompressedBuilder

    def started(self, *args, **kwargs):
        self.isa, self._requests, self.kv_cache_spec = isa, object(), SimpleNamespace(method="snapkv")

    monkeypatch.setattr(CompressedBuilder, "__init__", started)
    if isa == "vec":
        assert backends.VecBuilder() is not None
    else:
        with pytest.raises(ConfigError, match=rf"CPU_ATTN uses its '{isa}' kernels.*dtype=float32"):
            backends.VecBuilder()


def test_layers_of_one_table_have_one_method():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from llm_accel.integrations.vllm.scheduling import CompressedSpec

    plain = FullAttentionSpec(**FULL)
    one, other = (CompressedSpec.of(plain, f"snapkv:budget={budget}") for budget in (100, 200))
    assert CompressedSpec.merge([one, one]) == one
    for specs in ([one, other], [one, plain]):
        with pytest.raises(ConfigError, match="must have the same method"):
            CompressedSpec.merge(specs)


def test_both_ways_to_spread_a_context(monkeypatch):
    from llm_accel.integrations.vllm import checks

    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=2, enable_dbo=False)
    found = config(
        "snapkv", parallel_config=parallel, cache_config=SimpleNamespace(cache_dtype="auto"), kv_transfer_config=None
    )
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: found)
    with pytest.raises(ConfigError, match="context parallelism"):
        checks.check_engine("CPU_ATTN", takes_kv=True)


def test_graphs_and_kernels_that_would_go_past_the_tables():
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from llm_accel.integrations.vllm.scheduling import CompressedSpec
    from llm_accel.integrations.vllm.steps import CompressedBuilder

    class Parent:
        supports_update_block_table = True

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            return AttentionCGSupport.ALWAYS

        def use_cascade_attention(self, *args, **kwargs):
            return True

    class Builder(CompressedBuilder, Parent):
        pass

    plain = FullAttentionSpec(**FULL)
    assert Builder.get_cudagraph_support(None, plain) is AttentionCGSupport.ALWAYS
    ours = CompressedSpec.of(plain, "snapkv:budget=100")
    assert Builder.get_cudagraph_support(None, ours) is AttentionCGSupport.NEVER
    made = Builder.__new__(Builder)
    for requests, cascade in ((None, True), (object(), False)):
        made._requests = requests
        assert made.use_cascade_attention() is cascade
    assert not Builder.supports_update_block_table


# --- models ----------------------------------------------------------------------------------------------------------

TOWER = "flowcut:budget=20"
BEHIND = f"{TOWER},tower_stage=behind,llm_stage=off"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2)}, "tensor parallelism spreads the heads"),
        ({"compilation_config": SimpleNamespace(compile_mm_encoder=True)}, "the vision tower is compiled"),
    ],
)
def test_towers_that_cannot_be_looked_at(wrong, reason):
    from llm_accel.integrations.vllm.visual import check_tower

    check_tower(parse(TOWER), config(TOWER), {})
    check_tower(parse("stride_tokens"), config("stride_tokens", **wrong), {})  # it does not look
    with pytest.raises(ConfigError, match=reason):
        check_tower(parse(TOWER), config(TOWER, **wrong), {})


@pytest.mark.parametrize(
    ("kind", "method", "reason"),
    [
        ("pixtral.PixtralHFVisionModel", "stride_tokens", "Pixtral towers mark each line's end"),
        ("siglip.SiglipVisionModel", TOWER, "only the attention of CLIP towers is known"),
        ("siglip.SiglipVisionModel", "stride_tokens", None),
        ("clip.CLIPVisionModel", TOWER, None),
    ],
)
def test_towers_of_llava(kind, method, reason, monkeypatch):
    from llm_accel.integrations.vllm.llava import AccelLlava, LlavaForConditionalGeneration

    module, _, name = kind.partition(".")
    tower = of(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name))

    def started(self, *, vllm_config, prefix=""):
        nn.Module.__init__(self)
        self.vision_tower, self.config = tower, SimpleNamespace(vision_feature_layer=-2)

    monkeypatch.setattr(LlavaForConditionalGeneration, "__init__", started)
    if reason is None:
        assert AccelLlava(vllm_config=config(method)).method is not None
    else:
        with pytest.raises(ConfigError, match=reason):
            AccelLlava(vllm_config=config(method))


@pytest.mark.parametrize(
    ("kind", "layer", "reason"),
    [
        ("clip.CLIPVisionModel", -1, "only the attention of SigLIP towers is known"),
        ("siglip.SiglipVisionModel", [-1, -2], "features come from several layers"),
    ],
)
def test_towers_of_onevision(kind, layer, reason):
    from llm_accel.integrations.vllm.tiled import PackedModel

    module, _, name = kind.partition(".")
    tower = of(getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name))

    class Parent:
        def __init__(self, *, vllm_config, prefix=""):
            self.vision_tower = tower
            self.config = SimpleNamespace(model_type="llava_onevision", vision_feature_layer=layer)

    class Model(PackedModel, Parent):
        pass

    assert Model(vllm_config=config("stride_tokens")).method is not None
    with pytest.raises(ConfigError, match=reason):
        Model(vllm_config=config(TOWER))


@dataclass(frozen=True)
class Graphs:
    modalities: list[str]


class Qwen:
    is_multimodal_pruning_enabled = False

    def __init__(self, *, vllm_config, prefix=""):
        attention = SimpleNamespace(attn=SimpleNamespace(attn=nn.Identity()))
        self.visual = SimpleNamespace(blocks=[attention] * 2)

    def get_encoder_cudagraph_config(self):
        return Graphs(["image", "video"])


PIPELINE = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=2)


@pytest.mark.parametrize(
    ("method", "wrong", "reason"),
    [
        ("stride_tokens:positions=compact", {}, "positions have three axes here"),
        (BEHIND, {"parallel_config": PIPELINE}, "with pipeline parallelism later stages do not see"),
        (BEHIND, {"speculative_config": object()}, "speculative decoding gives the same rows to another model"),
    ],
)
def test_models_with_three_axes(method, wrong, reason):
    from llm_accel.integrations.vllm.mrope import MropeModel

    class Model(MropeModel, Qwen):
        pass

    blind = "stride_tokens"
    assert Model(vllm_config=config(blind, **wrong)).method is not None
    assert Model(vllm_config=config(BEHIND)).get_encoder_cudagraph_config() == Graphs([])
    with pytest.raises(ConfigError, match=re.escape(reason)):
        Model(vllm_config=config(method, **wrong))


def test_videos_that_vllm_prunes_itself():
    from llm_accel.integrations.vllm.mrope import MropeModel

    class Model(MropeModel, Qwen):
        is_multimodal_pruning_enabled = True

    with pytest.raises(ConfigError, match="leave video_pruning_rate out"):
        Model(vllm_config=config(TOWER))


def test_a_known_model_whose_interfaces_differ(monkeypatch):
    from llm_accel.integrations.vllm import checks, compat

    found = config("stride_tokens")
    found.model_config.architectures = ["LlavaForConditionalGeneration"]
    monkeypatch.setattr(checks, "get_current_vllm_config_or_none", lambda: found)
    monkeypatch.setattr(compat, "problem", lambda feature: f"vllm 9 differs: {feature}")
    with pytest.raises(ConfigError, match="vllm 9 differs: LlavaForConditionalGeneration"):
        checks.check_engine("CPU_ATTN", takes_kv=True)


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_command_says_what_the_installed_vllm_lacks(monkeypatch, capsys):
    from llm_accel.cli import main
    from llm_accel.integrations.vllm import compat

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(compat, "problem", lambda feature: "vllm 9 differs")
    assert main(["vllm", "some/model", "--method", "snapkv"]) == 2
    assert "snapkv cannot run in this vLLM: vllm 9 differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--shared-prefill"], "--shared-prefill is for the transformers engine"),
        (["--model", "/no/such/folder"], "'/no/such/folder'"),
    ],
)
def test_the_needle_on_vllm(more, reason, capsys, tmp_path):
    from llm_accel.cli import main

    assert main(["needle", "--engine", "vllm", "--lengths", "512", "--no-plot", "--out", str(tmp_path), *more]) == 2
    assert reason in capsys.readouterr().err


def test_a_needle_for_which_nothing_was_freed():
    from llm_accel import UnsupportedCallError
    from llm_accel.integrations.vllm.blocks import policy_of
    from llm_accel.integrations.vllm.needle import _held

    spec = SimpleNamespace(page_size_bytes=8, block_size=32, method="snapkv", policy=policy_of("snapkv:budget=100", 32))
    manager = SimpleNamespace(kv_cache_spec=spec, freed=0)
    cache = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["a", "b"])]),
        coordinator=SimpleNamespace(single_type_managers=[manager]),
    )
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=cache)))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    assert _held(llm, [(90, 5)]) == ([3 * 16], [3 * 16])  # within the budget
    with pytest.raises(UnsupportedCallError, match="freed no block"):
        _held(llm, [(300, 5)])
    manager.freed = 7
    assert _held(llm, [(300, 5)]) == ([3 * 16], [10 * 16])
