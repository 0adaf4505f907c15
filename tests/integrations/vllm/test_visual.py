"""Fewer visual tokens in vLLM: prompts that are shorter, and the same tokens as in transformers. Skipped where vLLM is
not installed."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest

from llm_accel.common.bundled import vision_model_path
from llm_accel.methods import TowerTokens
from llm_accel.registry import parse
from tests.integrations.vllm import kit, tiny_vision
from tests.integrations.vllm.visual_kit import (
    check_videos_are_refused,
    in_transformers,
    in_vllm,
    limits,
    scenes_in_transformers,
    scenes_in_vllm,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
KEPT = {"stride_tokens": 34, "random_tokens": 34, "flowcut": 34, "visionzip": 64}
"""Of the 100 tokens of a scene, with the methods' defaults: a third, or VisionZip's 54 and 10."""


@pytest.mark.parametrize("method", [None, *KEPT])
def test_llava_answers_as_in_transformers(method):
    with kit.engine(vision_model_path(), method, max_model_len=512) as llm:
        found, placeholders = scenes_in_vllm(llm)
    assert set(placeholders) == {100 if method is None else KEPT[method]}
    assert found == scenes_in_transformers(method)
    assert len({tuple(one) for one in found}) > 5


def test_llava_with_an_image_split_over_chunks_and_a_kv_method_beside_it():
    with kit.engine(vision_model_path(), "flowcut", max_model_len=512, max_num_batched_tokens=16) as llm:
        found, _ = scenes_in_vllm(llm)
        again, _ = scenes_in_vllm(llm)
    assert found == again == scenes_in_transformers("flowcut")
    with kit.engine(vision_model_path(), "flowcut+snapkv:budget=512", max_model_len=512) as llm:
        assert scenes_in_vllm(llm)[0] == found  # the prompts are within the budget
        assert type(kit.manager(llm)).__name__ == "CompressedManager"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return cache(lambda family: tiny_vision.save(family, tmp_path_factory.mktemp(family)))


BEHIND = "flowcut:tower_stage=behind,llm_stage=off"
QWEN = [
    ("qwen2_vl", BEHIND, 12),
    ("qwen2_5_vl", None, 2048),
    ("qwen2_5_vl", "random_tokens", 2048),
    ("qwen2_5_vl", BEHIND, 12),
    ("qwen2_5_vl", "visionzip:dominant=5,contextual=2", 2048),
    ("qwen3_vl", None, 2048),
    ("qwen3_vl", "stride_tokens", 2048),
    ("qwen3_vl", BEHIND, 12),
    ("qwen3_vl", "visionzip:dominant=5,contextual=2", 2048),
]


@pytest.mark.parametrize(("family", "method", "chunk"), QWEN)
def test_qwen_answers_as_in_transformers(tiny, family, method, chunk):
    """Original positions on three axes, tall and wide images, two of them, chunks that end inside an image."""
    folder, prompts = tiny(family), tiny_vision.prompts(family)
    with kit.engine(folder, method, max_num_batched_tokens=chunk, **limits(method)) as llm:
        found, _ = in_vllm(llm, prompts)
        again, _ = in_vllm(llm, prompts)  # by prefix caching, and from the encoder's cache
        if method is not None:
            check_videos_are_refused(llm, family)
    assert found == again == in_transformers(folder, prompts, method)
    assert len({token for one in found for token in one}) > 30
    blind = method is not None and not isinstance(parse(method), TowerTokens)
    assert not blind or found != in_transformers(folder, prompts, None)


TILED = [
    ("llava_next", "random_tokens:ratio=0.4,newline=keep", 12),
    ("llava_onevision", None, 2048),
    ("llava_onevision", "random_tokens:budget=9", 2048),
    ("llava_onevision", "flowcut:budget=20,newline=keep", 12),
    ("llava_onevision", "visionzip:dominant=5,contextual=2", 2048),
    ("internvl", "stride_tokens:budget=7", 2048),
    ("internvl", "flowcut:budget=5,tower_stage=behind", 12),
    ("internvl", "visionzip:dominant=4,contextual=2", 2048),
]


@pytest.mark.parametrize(("family", "method", "chunk"), TILED)
def test_models_with_tiles_answer_as_in_transformers(tiny, family, method, chunk):
    """Images that fill their tiles and such that do not, one that is made smaller behind the projector, two images."""
    folder, prompts = tiny(family), tiny_vision.prompts(family)
    with kit.engine(folder, method, max_num_batched_tokens=chunk, **limits(method)) as llm:
        found, placeholders = in_vllm(llm, prompts)
        again, _ = in_vllm(llm, prompts)
        if method is not None and family != "llava_next":
            check_videos_are_refused(llm, family)
    assert found == again == in_transformers(folder, prompts, method, positions="compact")
    assert len({token for one in found for token in one}) > 30
    assert method is None or found != in_transformers(folder, prompts, None)
    assert all(placeholders) and len(set(placeholders)) > 1  # pairs have more
