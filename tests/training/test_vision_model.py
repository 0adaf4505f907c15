"""The bundled vision model: its files, that packing changes nothing, and that it really sees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llm_accel.common import bundled
from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.questions import TASKS, questions
from llm_accel.eval.tasks.vision.scenes import Scene
from training.vision_check import accuracy, answer_logits, features_with_gaps, saliency, visual_features
from training.vision_data import IGNORED, PREFIX, draw_scenes, pack, patch_classes
from training.vision_init import USED_LAYERS, WORDS, build_processor

Bundle = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield bundled.load_vision_model()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw_scenes(48, 77)


def answer(bundle: Bundle, scene: Scene, prompt: str) -> str:
    model, processor = bundle
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt").to(model.dtype)
    ids = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert ids[-1] == processor.tokenizer.eos_token_id
    return str(processor.decode(ids, skip_special_tokens=True))


def test_files_are_small_and_complete() -> None:
    folder = bundled.vision_model_path()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    loadable = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"}
    assert loadable | {"train.log", "TRAINING.md"} <= {path.name for path in folder.iterdir()}
    assert loadable <= {path.name for path in bundled.vision_model_path(gaps=False).iterdir()}


def test_damaged_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "vision"
    shutil.copytree(bundled.vision_model_path(), broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(bundled, "vision_model_path", lambda gaps: broken)
    with pytest.raises(ConfigError, match=r"bundled vision model cannot be loaded from .*Reinstall"):
        bundled.load_vision_model()


def test_processor_equals_the_built_one_and_the_training_data(bundle: Bundle, scenes: list[Scene]) -> None:
    processor = bundle[1]
    assert processor.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    rng = np.random.default_rng(0)
    for scene in scenes[:4]:
        for question in (q for task in TASKS for q in questions(scene, rng, task)):
            batch = pack([scene], [[question]])
            inputs = processor(images=scene.image, text=question.prompt, return_tensors="pt")
            assert torch.equal(inputs["input_ids"], batch.ids[:, : batch.spans[0][1]])
            assert torch.equal(inputs["pixel_values"], batch.pixels)
            labels = batch.labels[batch.labels != IGNORED]
            assert processor.decode(labels, skip_special_tokens=True) == question.answer
            assert processor.tokenizer.unk_token_id not in batch.ids
    assert len(WORDS) == len(set(WORDS)) == bundle[0].config.text_config.vocab_size


def test_packed_questions_give_what_single_ones_give(bundle: Bundle, scenes: list[Scene]) -> None:
    model, rng = bundle[0], np.random.default_rng(0)
    rows = [scene for scene in scenes if len(scene.things) > 2][:2]
    asked = [[q for task in TASKS for q in questions(scene, rng, task)] for scene in rows]
    batch = pack(rows, asked)
    packed = answer_logits(model, batch, visual_features(model, batch.pixels)[2])[0]
    single = []
    for scene, row in zip(rows, asked, strict=True):
        for question in row:
            one = pack([scene], [[question]])
            logits = model(input_ids=one.ids, pixel_values=one.pixels).logits[0]
            single.append(logits[one.spans[0][1] - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-4)


def test_hidden_tokens_count_as_removed(bundle: Bundle, scenes: list[Scene]) -> None:
    model, scene = bundle[0], scenes[0]
    question = questions(scene, np.random.default_rng(0), "caption")
    hidden = torch.rand(1, PREFIX - 1, generator=torch.Generator().manual_seed(0)) < 0.5
    batch = pack([scene], [question], hidden)
    tokens = visual_features(model, batch.pixels)[2]
    kept = torch.cat([torch.tensor([True]), ~hidden[0], torch.ones(batch.ids.shape[1] - PREFIX, dtype=torch.bool)])
    embeddings = model.get_input_embeddings()(batch.ids)
    embeddings[:, 1:PREFIX] = tokens
    shorter = model.model.language_model(inputs_embeds=embeddings[:, kept], position_ids=batch.positions[:, kept])
    logits = model.lm_head(shorter.last_hidden_state[0])[(batch.labels[0, 1:] != IGNORED)[kept[1:]].nonzero()[:, 0]]
    torch.testing.assert_close(answer_logits(model, batch, tokens)[0], logits, rtol=1e-4, atol=1e-4)


def test_patches_that_left_the_tower_count_as_removed(bundle: Bundle, scenes: list[Scene]) -> None:
    tower, pixels = bundle[0].model.vision_tower, pack(scenes[:1], [[]]).pixels
    leaves = torch.randint(0, USED_LAYERS + 1, (1, 100), generator=torch.Generator().manual_seed(0))
    hidden, here = tower.pre_layrnorm(tower.embeddings(pixels)), torch.arange(100)
    for i, layer in enumerate(tower.encoder.layers[:USED_LAYERS]):
        hidden = layer(hidden, None)
        stay = leaves[0, here] > i
        here, hidden = here[stay], hidden[:, torch.cat([torch.tensor([True]), stay])]
    torch.testing.assert_close(features_with_gaps(bundle[0], pixels, leaves)[:, here], hidden[:, 1:])
    whole = features_with_gaps(bundle[0], pixels, torch.full((1, 100), USED_LAYERS))
    torch.testing.assert_close(whole, visual_features(bundle[0], pixels)[1])


def test_patch_classes_name_the_thing_in_the_patch(scenes: list[Scene]) -> None:
    for scene in scenes:
        classes = patch_classes(scene)
        assert ((classes > 0) == scene.patches.ravel()).all()
        for thing in scene.things:
            y, x = (thing.box[0] + thing.box[2]) // 16, (thing.box[1] + thing.box[3]) // 16  # patch of its centre
            assert classes[10 * y + x] == 1 + thing.pair


def test_the_model_sees(bundle: Bundle, scenes: list[Scene]) -> None:
    found = accuracy(bundle[0], scenes, 0)
    bars = {"existence": 0.95, "colour": 0.93, "shape": 0.93, "count": 0.93, "caption": 0.9, "spatial": 0.85}
    assert {task: found[task] >= bar for task, bar in bars.items()} == dict.fromkeys(bars, True), found
    blind = accuracy(bundle[0], scenes[:32], 0, shown="none")
    limits = {"existence": 0.65, "colour": 0.5, "shape": 0.5, "count": 0.45, "caption": 0.1, "spatial": 0.7}
    assert {task: blind[task] <= limit for task, limit in limits.items()} == dict.fromkeys(limits, True), blind


def test_the_class_token_looks_at_things(bundle: Bundle, scenes: list[Scene]) -> None:
    assert saliency(bundle[0], scenes) > 0.95


def test_only_training_with_gaps_survives_them(bundle: Bundle, scenes: list[Scene]) -> None:
    plain, _ = bundled.load_vision_model(gaps=False)
    with_gaps, without = (accuracy(model, scenes[:16], 0, shown="things") for model in (bundle[0], plain))
    assert with_gaps["count"] > without["count"] + 0.2
    assert accuracy(plain, scenes[:16], 0)["count"] >= 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generate_answers_through_the_processor(dtype: torch.dtype, scenes: list[Scene]) -> None:
    bundle, rng = bundled.load_vision_model(dtype), np.random.default_rng(1)
    asked = [(scene, q) for scene in scenes[:2] for task in TASKS for q in questions(scene, rng, task)]
    right = [answer(bundle, scene, q.prompt) == q.answer for scene, q in asked]
    assert np.mean(right) >= 0.85
