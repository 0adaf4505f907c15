"""Fewer visual tokens in vLLM: prompts that are shorter, and the same tokens as in transformers. Skipped where vLLM is
not installed."""

from __future__ import annotations

import importlib.util
from functools import cache

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llm_accel
from llm_accel.common.bundled import vision_model_path
from llm_accel.eval.tasks.vision.examples import SceneSource
from llm_accel.methods import TowerTokens
from llm_accel.registry import parse
from tests.integrations.vllm import kit, tiny_qwen

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
KEPT = {"stride_tokens": 34, "random_tokens": 34, "flowcut": 34, "visionzip": 64}
"""Of the 100 tokens of a scene, with the methods' defaults: a third, or VisionZip's 54 and 10."""
SUPPRESSED = list(tiny_qwen.SPECIAL.values())
NEW = 16


@cache
def scenes() -> list[tuple[str, Image.Image]]:
    source = SceneSource(4, 0)
    found = [example for index in range(4) for example in source.examples(index)]
    return [(f"<image> {one.question}", Image.fromarray(one.image)) for one in found]


def scenes_in_transformers(method: str | None) -> list[list[int]]:
    model = AutoModelForImageTextToText.from_pretrained(vision_model_path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(vision_model_path())
    if method is not None:
        llm_accel.apply(model, method, positions="compact")
    found = []
    for text, image in scenes():
        batch = processor(text=[text], images=[image], return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        found.append(out[0, batch["input_ids"].shape[1] :].tolist())
    return found


def scenes_in_vllm(llm) -> tuple[list[list[int]], int]:
    from vllm import SamplingParams

    given = [{"prompt": text, "multi_modal_data": {"image": image}} for text, image in scenes()]
    done = llm.generate(given, SamplingParams(temperature=0, max_tokens=NEW), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done], done[0].prompt_token_ids.count(4)


@pytest.mark.parametrize("method", [None, *KEPT])
def test_llava_answers_as_in_transformers(method):
    with kit.engine(vision_model_path(), method, max_model_len=512) as llm:
        found, placeholders = scenes_in_vllm(llm)
    assert placeholders == (100 if method is None else KEPT[method])
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
def qwen(tmp_path_factory):
    return cache(lambda family: tiny_qwen.save(family, tmp_path_factory.mktemp(family)))


def qwen_in_transformers(folder, method: str | None) -> list[list[int]]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if method is not None:
        llm_accel.apply(model, parse(method))
    found = []
    for text, images in tiny_qwen.prompts():
        batch = processor(text=[text], images=images, return_tensors="pt")
        out = model.generate(
            **batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, suppress_tokens=[*SUPPRESSED, 2]
        )
        found.append(out[0, batch["input_ids"].shape[1] :].tolist())
    return found


def qwen_in_vllm(llm) -> list[list[int]]:
    from vllm import SamplingParams

    never = dict.fromkeys([*SUPPRESSED, 2], -100.0)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, min_tokens=NEW, ignore_eos=True, logit_bias=never)
    given = [{"prompt": text, "multi_modal_data": {"image": images}} for text, images in tiny_qwen.prompts()]
    return [list(one.outputs[0].token_ids) for one in llm.generate(given, sampling, use_tqdm=False)]


QWEN = [
    ("qwen2_vl", "flowcut", 12),
    ("qwen2_5_vl", None, 2048),
    ("qwen2_5_vl", "random_tokens", 2048),
    ("qwen2_5_vl", "flowcut", 12),
    ("qwen2_5_vl", "visionzip:dominant=5,contextual=2", 2048),
    ("qwen3_vl", None, 2048),
    ("qwen3_vl", "stride_tokens", 2048),
    ("qwen3_vl", "flowcut", 12),
    ("qwen3_vl", "visionzip:dominant=5,contextual=2", 2048),
]


@pytest.mark.parametrize(("family", "method", "chunk"), QWEN)
def test_qwen_answers_as_in_transformers(qwen, family, method, chunk):
    """Original positions on three axes, tall and wide images, two of them, chunks that end inside an image."""
    folder = qwen(family)
    limits = (
        {"limit_mm_per_prompt": {"image": 2, "video": 0}} if method is None else {"limit_mm_per_prompt": {"image": 2}}
    )
    with kit.engine(folder, method, max_num_batched_tokens=chunk, **limits) as llm:
        found = qwen_in_vllm(llm)
        again = qwen_in_vllm(llm)  # by prefix caching, and from the encoder's cache
    assert found == again == qwen_in_transformers(folder, method)
    assert len({token for one in found for token in one}) > 30
    assert method is None or issubclass(type(parse(method)), TowerTokens) or found != qwen_in_transformers(folder, None)
