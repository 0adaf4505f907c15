"""Answers prompts about one image with one method, and measures what it saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList

from llm_accel.api import apply
from llm_accel.common.generation import Clock, cut, end_tokens, greedy
from llm_accel.errors import ConfigError
from llm_accel.eval.cost import mean_flops
from llm_accel.eval.tasks.vision.controls import Blank, Blind, InputControl, with_patch_order
from llm_accel.eval.tasks.vision.examples import Example
from llm_accel.eval.tasks.vision.prefill import counting, kept_patches
from llm_accel.eval.tasks.vision.processor import VisionProcessor, blank
from llm_accel.methods import MethodConfig, StepEviction


@dataclass(frozen=True)
class VisionOutcome:
    """One batch of prompts. All but answers and patches is the mean of a prompt.

    Attributes:
        answers: text per prompt.
        prefill_ms: until the first token, image encoding included, divided by the prompts of the batch.
        visual_before: visual tokens of a prompt.
        visual_after: those that reach the last layer.
        visual_per_layer: those that a layer sees, mean over layers.
        flops: operations of the decoder layers on the prompt, or None.
        kept: per prompt, of each visual token the share of KV heads of the last layer that hold it after the prompt;
            None where it was not traced.
    """

    answers: list[str]
    prefill_ms: float
    visual_before: int
    visual_after: float
    visual_per_layer: float
    flops: int | None
    kept: list[list[float]] | None


class VisionEngine:
    """A vision-language model with its processor, and one method at a time applied to it."""

    def __init__(self, model: Any, reader: VisionProcessor, max_new_tokens: int, seed: int = 0) -> None:
        self.model, self.reader, self.max_new_tokens, self.seed = model, reader, max_new_tokens, seed
        self.image_token = int(reader.tokenizer.convert_tokens_to_ids(reader.image_token))
        self.ends = end_tokens(model, reader.tokenizer)
        self._options = greedy(self.ends, reader.tokenizer)

    def run(self, examples: Sequence[Example], configs: Sequence[MethodConfig]) -> VisionOutcome:
        """Answers examples that share an image. The methods stay on the model for this call only."""
        control = next((config for config in configs if isinstance(config, InputControl)), None)
        if control is not None or not configs:
            return self._answer(examples, None, control)
        told = with_patch_order(configs, examples[0].patches, self.seed + examples[0].sample)
        stepwise = any(isinstance(config, StepEviction) for config in told)  # which positions stay changes all the time
        with apply(self.model, list(told), trace=not stepwise) as handle:
            return self._answer(examples, handle, None)

    def try_method(self, configs: Sequence[MethodConfig]) -> None:
        """Applies and removes, so that what cannot work is known before a run begins."""
        controls = [config for config in configs if isinstance(config, InputControl)]
        if controls and len(configs) > 1:
            raise ConfigError(f"{controls[0].name} runs the model without a plug-in; it cannot be joined with methods.")
        if configs and not controls:
            apply(self.model, list(configs)).remove()

    def _answer(self, examples: Sequence[Example], handle: Any, control: InputControl | None) -> VisionOutcome:
        sighted = not isinstance(control, Blind)
        images = [blank(e.image) if isinstance(control, Blank) else e.image for e in examples] if sighted else []
        batch = self.reader.encode([self.reader.text(e.question, sighted) for e in examples], images)
        batch = {key: value.to(self.model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype) if sighted else None
        ids, mask = batch["input_ids"], batch["attention_mask"]
        clock = Clock(ids.device)
        with counting(self.model) as rows:
            begin = clock.now()
            output = self.model.generate(
                **{key: value for key, value in batch.items() if value is not None},
                max_new_tokens=self.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
                **self._options,
            )
        before = int((ids == self.image_token).sum()) // len(examples)
        gone = [ids.shape[1] - n for n in rows]  # alike in all prompts of the batch, which share their image
        after = float(before)
        kept: list[list[float]] | None = [[1.0] * before for _ in examples]
        if handle is not None:
            report = handle.report()
            kept = kept_patches(report.layers[-1], ids, mask, self.image_token)
            if report.visual_tokens_after is not None:
                after = report.visual_tokens_after / len(examples)
        return VisionOutcome(
            answers=[self.reader.decode(cut(row, self.ends)) for row in output.sequences[:, ids.shape[1] :].tolist()],
            prefill_ms=1e3 * (clock.ticks[0] - begin) / len(examples),
            visual_before=before,
            visual_after=after,
            visual_per_layer=before - sum(gone) / len(gone),
            flops=mean_flops(self.model, mask.sum(dim=1).tolist(), gone),
            kept=kept if sighted else None,
        )
