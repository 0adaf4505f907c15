"""One batch: answers as alone, which patches stayed, and operations against a counter."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from llm_accel.errors import ConfigError
from llm_accel.eval.cost import prefill_flops
from llm_accel.eval.tasks.vision.controls import OracleTokens, with_patch_order
from llm_accel.eval.tasks.vision.engine import VisionEngine
from llm_accel.eval.tasks.vision.examples import SceneSource
from llm_accel.eval.tasks.vision.prefill import kept_patches
from llm_accel.eval.tasks.vision.processor import VisionProcessor, blank
from llm_accel.eval.tasks.vision.settings import parse_method, sweep
from llm_accel.eval.tasks.vision.sources import load_rows
from tests.eval.vision_helpers import tiny_model
from training.vision_init import build_processor


@pytest.fixture(scope="module")
def engine():
    return VisionEngine(tiny_model(), VisionProcessor(build_processor()), max_new_tokens=3)


@pytest.fixture(scope="module")
def examples():
    return SceneSource(1, 5).examples(0)


@pytest.mark.parametrize(
    "method", ["dense", "flowcut:budget=20", "fastv:budget=9", "random_tokens:budget=7+dyvte:exit=2"]
)
def test_a_padded_batch_answers_and_counts_as_alone(engine, examples, method):
    together = engine.run(examples[-4:], parse_method(method))
    alone = [engine.run([example], parse_method(method)) for example in examples[-4:]]
    assert together.answers == [one.answers[0] for one in alone]
    assert together.kept == [one.kept[0] for one in alone]
    for name in ("visual_before", "visual_after", "visual_per_layer"):
        assert {getattr(one, name) for one in alone} == {getattr(together, name)}
    assert together.flops == pytest.approx(sum(one.flops for one in alone) / 4, rel=2e-3)


def test_the_oracle_keeps_what_things_cover(engine, examples):
    covered = examples[0].patches.ravel()
    some = engine.run(examples[:3], (OracleTokens(budget=int(covered.sum()) - 2),))
    for kept in some.kept:
        assert sum(kept) == covered.sum() - 2 and not (np.array(kept) > covered).any()
    more = engine.run(examples[:1], (OracleTokens(budget=int(covered.sum()) + 5),))
    assert (np.array(more.kept[0]) >= covered).all() and sum(more.kept[0]) == covered.sum() + 5
    with pytest.raises(ConfigError, match="does not say where objects are"):
        with_patch_order((OracleTokens(),), None, 0)
    with pytest.raises(ConfigError, match=r"100 visual tokens.* 4 patches"):
        engine.run([replace(examples[0], patches=np.ones((2, 2), bool))], (OracleTokens(budget=3),))


def test_blind_has_no_image_and_blank_a_grey_one(engine, examples):
    assert engine.reader.text("what?") == "<image> what?" and engine.reader.text("what?", image=False) == "what?"
    blind, grey = (engine.run(examples[:2], parse_method(name)) for name in ("blind", "blank"))
    assert blind.visual_before == 0 and blind.kept is None and grey.visual_before == 100
    assert (blank(examples[0].image) == 128).all() and blank(examples[0].image).shape == (80, 80, 3)
    assert blank(Image.new("RGB", (7, 5))).size == (7, 5)


def test_operations_equal_those_of_a_counter_but_for_the_causal_half():
    decoder, n = tiny_model().get_decoder(), 37
    with FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=torch.randn(1, n, 32), use_cache=False)
    linear = counter.get_total_flops()  # the counter does not know the attention kernel of CPUs
    heads, head_dim, layers = 4, 8, 4
    attention = layers * heads * sum(2 * 2 * head_dim * (i + 1) for i in range(n))
    assert prefill_flops(tiny_model(), [n] * layers) == linear + attention
    half = prefill_flops(tiny_model(), [n, n, 0, 0])
    assert half == (linear + attention) // 2


def test_a_sweep_gives_shares_to_methods_without_one():
    specs = ("dense", "flowcut", "fastv:ratio=0.5", "dyvte", "snapkv:budget=64+stride_tokens", "oracle:budget=9")
    assert sweep(specs, (0.1, 0.2)) == (
        "dense", "flowcut:ratio=0.1", "flowcut:ratio=0.2", "fastv:ratio=0.5", "dyvte",
        "snapkv:budget=64+stride_tokens:ratio=0.1", "snapkv:budget=64+stride_tokens:ratio=0.2",
        "oracle:budget=9",
    )  # fmt: skip


def test_scenes_are_those_of_their_seed_whatever_is_asked():
    whole, part = SceneSource(3, 1), SceneSource(2, 1, tasks=("count",))
    first, second = whole.examples(1), part.examples(1)
    assert (first[0].image == second[0].image).all() and second[0].question in {e.question for e in first}
    yes_no = [e for e in first if e.task == "existence"]
    assert [(e.split, e.answer) for e in yes_no] == [
        (split, answer) for split in ("random", "popular", "adversarial") for answer in ("yes", "no")
    ]
    assert whole.digest() == SceneSource(3, 1).digest() != SceneSource(3, 2).digest()
    assert not np.array_equal(SceneSource(1, 1, "dense").examples(0)[0].image, whole.examples(0)[0].image)


def test_prompts_of_a_chat_template_begin_once():
    processor = build_processor()
    processor.chat_template = (
        "<bos>{% for part in messages[0].content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    )
    reader = VisionProcessor(processor)
    assert reader.text("describe the image.") == "<image>describe the image."
    ids = reader.encode([reader.text("describe the image.")], [np.zeros((80, 80, 3), np.uint8)])["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1 and ids.shape == (1, 1 + 100 + 4)
    with pytest.raises(ConfigError, match="vision-language"):
        VisionProcessor(processor.tokenizer)


def test_tokens_of_the_answer_are_no_patches():
    kept = torch.tensor([[[0, 2, 5, -1], [1, 2, 7, 9]]])  # positions from 5 on follow a prompt of five tokens
    ids, mask = torch.tensor([[1, 8, 8, 1, 1]]), torch.ones(1, 5, dtype=torch.long)
    assert kept_patches(SimpleNamespace(kept=kept), ids, mask, image_token=8) == [[0.5, 1.0]]


def test_keys_of_questions_are_known_without_asking_them(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pope = [{"image": "a.png", "question": "is there a cat?", "answer": answer} for answer in ("yes", "no")]
    chair = [{"image": "a.png", "objects": ["cat"]}]
    sources = [SceneSource(2, seed=0)]
    for kind, rows in (("pope", pope), ("chair", chair)):
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append(load_rows(f"{kind}:{tmp_path / kind}.jsonl", None))
    for source in sources:
        for sample in range(len(source)):
            assert source.keys(sample) == [example.key for example in source.examples(sample)]
