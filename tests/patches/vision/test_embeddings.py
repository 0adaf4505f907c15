"""Embeddings in place of token ids: with placeholders among them all is as ever, once features are merged nobody knows
which rows are visual, and every method says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import UnsupportedCallError, list_methods
from tests.tiny_vlm import ONE, decode, family_for, inputs, tiny_vlm
from tests.vision_oracle import decoder_inputs

VISUAL = [name for name, kind in list_methods().items() if kind.info.kinds == ("vision",)]


def embedded(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The same call with embeddings, in which placeholders stand."""
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return rest | {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}


@pytest.mark.parametrize("name", VISUAL)
def test_merged_embeddings_are_refused_by_every_method(name: str) -> None:
    model = tiny_vlm(family_for(name))
    batch = inputs(model, ONE)
    merged = decoder_inputs(model, batch)["inputs_embeds"].detach()
    with llm_accel.apply(model, name) as handle:
        with pytest.raises(UnsupportedCallError, match="must know which"):
            model.generate(inputs_embeds=merged, attention_mask=batch["attention_mask"], max_new_tokens=3)
        with handle.disabled():
            model.generate(inputs_embeds=merged, attention_mask=batch["attention_mask"], max_new_tokens=3)


@pytest.mark.parametrize("method", ["stride_tokens", "flowcut", "visionzip", "fastv"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_embeddings_beside_pixels(family: str, method: str) -> None:
    model = tiny_vlm(family)
    batch = inputs(model, ONE)
    with llm_accel.apply(model, method, ratio=0.5) as handle:
        wanted = decode(model, batch)
        expected = handle.report()
        with torch.no_grad():
            first = model(**embedded(model, batch)).logits[:, -1]
        report = handle.report()
    assert torch.allclose(first, wanted[1][:, 0], atol=1e-5)
    assert report.visual_tokens_before == expected.visual_tokens_before
    assert report.visual_tokens_after == expected.visual_tokens_after
    assert 0 < report.visual_tokens_after < report.visual_tokens_before
