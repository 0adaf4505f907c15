"""``llm-accel calibrate dyvte`` on a saved model with a processor, from images on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import llm_accel
from llm_accel.calibrate.dyvte import train
from llm_accel.calibrate.dyvte.samples import process_pairs, scene_pairs
from llm_accel.cli import main
from llm_accel.common.bundled import load_vision_model
from tests.tiny_vlm import IMAGE, decode, tiny_vlm

WORDS = ["<pad>", "<s>", "<unk>", "USER", "ASSISTANT", "what", "is", "this", "a", "red", "cross"]
TEMPLATE = (
    "<s> USER {% for part in messages[0].content %}{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    " ASSISTANT"
)


def processor(template: str | None = TEMPLATE) -> LlavaProcessor:
    vocabulary = {word: index for index, word in enumerate(WORDS)} | {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def calibrate(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["calibrate", "dyvte", *args])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_from_files_to_a_plug_in(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "STEPS", 5)
    model = tiny_vlm()
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "prompt": "what is this"},
        {"image": "a.png", "prompt": "<s> <image> what is this", "answer": "a red cross"},
    ]
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    args = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    code, printed, _ = calibrate(capsys, *args, "--router-dim", "4", "--max-new-tokens", "3", "--dtype", "float32")
    assert code == 0 and printed.split()[:5] == ["layer", "safe", "changed", "at", "most"]
    assert "too few samples for any layer to be trusted: 149 are needed" in printed
    summary = json.loads(printed.splitlines()[-1])
    assert json.loads((out / "summary.json").read_text()) == summary
    records = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [record["length"] for record in records] == [1 + 1 + 16 + 3 + 1, 1 + 16 + 3]
    assert records[1]["answer"] == [8, 9, 10] and [record["given"] for record in records] == [False, True]
    for method in ({"calibration": str(out)}, {"routers": str(out)}):
        with llm_accel.apply(model, "dyvte", **method):
            ids = torch.tensor([[1, 3] + [IMAGE] * 16 + [5, 6, 7]])
            decode(model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 28, 28)})


def test_arguments_that_cannot_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    for text, words in [("{}", "row 1: KeyError('image')"), ("", "is empty"), ("[1]", "row 1"), ("{", "line 1")]:
        data.write_text(text)
        code, _, error = calibrate(capsys, "--model", "x", "--data", str(data))
        assert code == 2 and words in error
    assert "--data is missing" in calibrate(capsys, "--model", "x")[2]
    assert "no such file" in calibrate(capsys, "--model", "x", "--data", str(tmp_path / "none"))[2]
    data.write_text('{"image": "a.png", "prompt": "what"}')
    assert "no such folder" in calibrate(capsys, "--model", str(tmp_path / "none"), "--data", str(data))[2]
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in calibrate(capsys, "--model", str(tmp_path / "empty"), "--data", str(data))[2]
    assert main(["calibrate", "dyvt"]) == 2
    assert "Did you mean 'dyvte'?" in capsys.readouterr().err


def test_scenes_are_drawn_apart_and_take_turns() -> None:
    """The same for every number of samples, each prompt without its placeholder, all tasks among twelve of them."""
    few, many, others = (list(scene_pairs(*args)) for args in [(4, 0), (12, 0), (4, 1)])
    assert [pair.prompt for pair in few] == [pair.prompt for pair in many[:4]]
    assert all((a.image == b.image).all() for a, b in zip(few, many, strict=False))
    assert [pair.prompt for pair in few] != [pair.prompt for pair in others]
    assert {pair.prompt.split()[0] for pair in many} == {"is", "what", "how", "describe"}
    assert all(pair.answer is None and pair.image.shape == (80, 80, 3) for pair in many)


def test_the_bundled_model_has_a_calibration_of_its_own_weights() -> None:
    """No layer kept 98 % of the answers, so nothing leaves unless a layer is given, and the report says why."""
    model, processor = load_vision_model()
    pair = next(scene_pairs(1, 9))
    batch, _ = next(process_pairs(processor, [pair]))
    with llm_accel.apply(model, "dyvte") as handle:
        model.generate(**batch, max_new_tokens=3)
        report = handle.report()
    assert report.backends["exit"] == ("no layer was safe", "calibrated on 256 samples with these weights")
    assert (report.exit_layer, report.visual_tokens_before, report.visual_tokens_after) == (None, 100, 100)
