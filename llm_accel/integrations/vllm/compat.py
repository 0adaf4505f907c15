"""Whether the installed vLLM has the interfaces that we use: asked by name and by parameters, not by version.

A feature whose interfaces are missing is off, and an engine that asks for it fails at its start with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from typing import Any, Literal

TESTED = ("0.29", "0.32")
ANYWAY = "LLM_ACCEL_VLLM_UNTESTED"


@dataclass(frozen=True)
class Interface:
    """A class or function of vLLM.

    Attributes:
        path: ``module:name`` or ``module:Class.name``.
        parameters: names that it must take.
    """

    path: str
    parameters: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is missing, or None."""
        module, _, names = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # a torchvision for CUDA beside a torch for CPUs raises a RuntimeError
            return f"{module} cannot be imported: {error}"
        try:
            for name in names.split("."):
                found = getattr(found, name)
        except AttributeError:
            return f"{self.path} is missing"
        taken = inspect.signature(found).parameters if self.parameters else {}
        lost = [name for name in self.parameters if name not in taken]
        return f"{self.path} takes no {', '.join(lost)}" if lost else None


_MODELS = "vllm.model_executor.models"
_ALWAYS = (
    Interface("vllm.v1.attention.backends.registry:register_backend"),
    Interface("vllm.v1.attention.backend:AttentionBackend.get_impl_cls"),
    Interface("vllm.config:get_current_vllm_config_or_none"),
)
_KV = (
    Interface(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register", ("manager_class", "uniform_type_base_spec")
    ),
    Interface("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.check_kv_cache_spec_registry"),
    Interface("vllm.v1.kv_cache_interface:KVCacheSpec.prefix_cacheable"),
    Interface(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    Interface(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager._remove_blocks_in_range",
        ("request_id", "first_block", "last_block"),
    ),
    Interface(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
        ("request_id", "num_tokens"),
    ),
    Interface("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free", ("request_id",)),
    Interface("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks", ("request", "num_tokens")),
    Interface("vllm.v1.attention.backend:AttentionBackend.customize_spec", ("spec",)),
    Interface(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build", ("common_prefix_len", "common_attn_metadata")
    ),
)
_LLAVA = (
    Interface("vllm:ModelRegistry.register_model"),
    Interface(
        f"{_MODELS}.llava:LlavaForConditionalGeneration._image_pixels_to_features", ("vision_tower", "pixel_values")
    ),
    Interface(f"{_MODELS}.llava:LlavaProcessingInfo.get_num_image_tokens", ("image_width", "image_height")),
    Interface(f"{_MODELS}.llava:_build_llava_or_pixtral_hf_info"),
    Interface(f"{_MODELS}.llava:_build_llava_or_pixtral_hf_processor"),
)


@dataclass(frozen=True)
class Architecture:
    """A model whose images we can prune.

    Attributes:
        kind: the classes of ours that go before vLLM's.
        module: vLLM's module for it.
        family: what the names of vLLM's classes begin with.
    """

    kind: Literal["llava", "Mrope", "Packed", "Tile"]
    module: str
    family: str

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """What we need of vLLM's classes."""
        if self.kind == "llava":
            return _LLAVA
        start = f"{self.module}:{self.family}"
        model, processor = f"{start}ForConditionalGeneration", f"{start}MultiModalProcessor._get_prompt_updates"
        always = (Interface("vllm:ModelRegistry.register_model"), Interface(processor, ("mm_items",)))
        return always + {"Mrope": _mrope, "Packed": _packed, "Tile": _tile}[self.kind](start, model)


def _mrope(start: str, model: str) -> tuple[Interface, ...]:
    return (
        Interface(f"{model}.get_mrope_input_positions", ("input_tokens", "mm_features")),
        Interface(f"{model}._process_image_input", ("image_input",)),
        Interface(f"{model}.embed_input_ids", ("multimodal_embeddings", "is_multimodal")),
        Interface(f"{start}ProcessingInfo.get_num_image_tokens"),
        Interface(f"{start}DummyInputsBuilder"),
    )


def _packed(start: str, model: str) -> tuple[Interface, ...]:
    return (
        Interface(f"{model}._process_image_input", ("image_input",)),
        Interface(f"{model}._merge_image_patch_embeddings", ("image_size", "patch_embeddings", "strategy")),
        Interface(f"{start}ProcessingInfo._get_num_unpadded_features", ("npatches",)),
        Interface(f"{start}ProcessingInfo.get_image_size_with_most_features"),
    )


def _tile(start: str, model: str) -> tuple[Interface, ...]:
    return (
        Interface(f"{model}._process_vision_input", ("image_input",)),
        Interface(f"{start}ProcessingInfo.get_num_image_tokens", ("processor",)),
        Interface("vllm.multimodal.processing:PromptUpdateDetails.select_token_id"),
        Interface(f"{start}DummyInputsBuilder"),
    )


ARCHITECTURES = {
    "LlavaForConditionalGeneration": Architecture("llava", f"{_MODELS}.llava", "Llava"),
    "LlavaNextForConditionalGeneration": Architecture("Packed", f"{_MODELS}.llava_next", "LlavaNext"),
    "LlavaOnevisionForConditionalGeneration": Architecture("Packed", f"{_MODELS}.llava_onevision", "LlavaOnevision"),
    "InternVLForConditionalGeneration": Architecture("Tile", f"{_MODELS}.interns1", "InternS1"),
    "Qwen2VLForConditionalGeneration": Architecture("Mrope", f"{_MODELS}.qwen2_vl", "Qwen2VL"),
    "Qwen2_5_VLForConditionalGeneration": Architecture("Mrope", f"{_MODELS}.qwen2_5_vl", "Qwen2_5_VL"),
    "Qwen3VLForConditionalGeneration": Architecture("Mrope", f"{_MODELS}.qwen3_vl", "Qwen3VL"),
}
"""The models whose images we can prune, by their names in a model's configuration."""
FEATURES: dict[str, tuple[Interface, ...]] = {
    "kv": _KV,
    **{name: known.interfaces for name, known in ARCHITECTURES.items()},
}
"""What each feature needs: KV methods, and visual methods on one architecture each."""


def version() -> str:
    """vLLM's version, whatever the distribution is called."""
    return str(getattr(importlib.import_module("vllm"), "__version__", "unknown"))


def tested() -> bool:
    """Whether the tests run on this version of vLLM, or the user wants to try another one."""
    found = version().split(".")
    low, high = (tuple(map(int, end.split("."))) for end in TESTED)
    known = len(found) > 1 and found[0].isdigit() and found[1].isdigit()
    return bool(os.environ.get(ANYWAY)) or (known and low <= (int(found[0]), int(found[1])) <= high)


def problem(feature: str) -> str | None:
    """Why a feature of :data:`FEATURES` is off with the installed vLLM; None where it is on. KV methods are on only in
    the tested range: two of their interfaces are marked temporary."""
    problems = [why for one in (*_ALWAYS, *FEATURES[feature]) if (why := one.problem()) is not None]
    if problems:
        return f"vllm {version()} differs from what llm_accel knows: {'; '.join(dict.fromkeys(problems))}"
    if feature == "kv" and not tested():
        return (
            f"vllm {version()} is outside of the tested range {TESTED[0]} to {TESTED[1]}; {ANYWAY}=1 in the "
            "environment tries it anyway"
        )
    return None
