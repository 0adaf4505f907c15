"""What the vision tests share: a tiny random LLaVA that speaks of scenes, saved in a folder, and the command on it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from llm_accel.cli import main
from training.vision_init import build_processor, model_config


@cache
def tiny_model() -> LlavaForConditionalGeneration:
    """The bundled architecture with random weights, four decoder layers of hidden size 32."""
    config = model_config()
    for part, changes in (
        (config.vision_config, {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}),
        (config.text_config, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}),
    ):
        for name, value in changes.items():
            setattr(part, name, value)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.25)
    model.generation_config.suppress_tokens = [config.image_token_id]  # it would be taken for one of the prompt
    return model.eval()


def save_tiny(path: Path) -> str:
    """Writes model and processor; returns the folder as an argument."""
    tiny_model().save_pretrained(path)
    build_processor().save_pretrained(path)
    return str(path)


def vision(model: str, out: Path, *more: str) -> int:
    """``llm-accel vision`` on two scenes."""
    return main(["vision", "--model", model, "--samples", "2", "--max-new-tokens", "3", "--out", str(out), *more])


def records(out: Path) -> list[dict[str, Any]]:
    """What a run has appended."""
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
