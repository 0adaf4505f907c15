"""Methods on visual tokens in every mode of autograd: caches go on, and gradients are right or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import UnsupportedCallError
from llm_accel.registry import parse_all
from tests.contracts.laws import EXACT
from tests.contracts.test_autograd_modes import MODES
from tests.contracts.test_gradients import exact
from tests.tiny_vlm import inputs, tiny_vlm

PENALTY = "vasparse:prune_every=2,keep=0.5,protect_last=1"
VASPARSE = (PENALTY, "vasparse:prune_every=2,keep=0.5,merge=none,beta=0", "vasparse:prune_every=2,keep=0.5,beta=0")
DROPPING = (
    "flowcut:budget=6",
    "visionzip:budget=6",
    "fastv:budget=6",
    "dyvte:exit=1",
    "downsample:budget=9",
    "stride_tokens:budget=6",
    "random_tokens:budget=6",
    "flowcut:budget=6+snapkv:budget=12,window=4",
    "fastv:budget=6+h2o:budget=12",
)
every_method = pytest.mark.parametrize("method", [*DROPPING, *VASPARSE])


def talk(model: PreTrainedModel, cache: Any, first: str = "no_grad", then: str = "no_grad") -> list[Tensor]:
    """Last logits of a prompt with an image and of six steps after it."""
    batch = inputs(model)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    mask, logits = batch["attention_mask"], []
    with MODES[first]():
        logits.append(model(**batch, past_key_values=cache).logits[:, -1])
    with MODES[then]():
        for token in range(5, 11):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = model(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache)
            logits.append(step.logits[:, -1])
    return logits


@pytest.mark.parametrize(
    ("first", "then"),
    [("inference", "grad"), ("inference", "no_grad"), ("grad", "inference"), ("no_grad", "inference")],
)
@every_method
def test_a_conversation_in_changing_modes(method: str, first: str, then: str) -> None:
    model = tiny_vlm("llava")
    with llm_accel.apply(model, parse_all(method)) as handle:
        plain = talk(model, handle.new_cache())
        for one, other in zip(talk(model, handle.new_cache(), first, then), plain, strict=True):
            assert (one - other).abs().max() <= EXACT


@every_method
def test_gradients_are_finite_differences(method: str) -> None:
    """For the weights through which the image comes in; what is kept is a constant."""
    model, step = exact(tiny_vlm("llava")), 1e-5  # the error falls with the square of the step
    weight = model.model.multi_modal_projector.linear_1.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=weight.dtype)
    start = weight.detach().clone()

    def total(mode: str) -> Tensor:
        with llm_accel.apply(model, parse_all(method)) as handle:
            logits = talk(model, handle.new_cache(), mode, mode)
        generator = torch.Generator().manual_seed(6)
        return sum((one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum() for one in logits)

    with torch.enable_grad():
        recorded = total("grad")
        if method == PENALTY:
            with pytest.raises(UnsupportedCallError, match="the penalty of vasparse has no gradient"):
                recorded.backward()
            return
        recorded.backward()
    assert weight.grad is not None
    ends = []
    for sign in (1, -1):
        weight.data = start + sign * step * direction
        ends.append(total("no_grad"))
    difference = (ends[0] - ends[1]) / (2 * step)
    assert abs(difference) > 0.1
    assert ((weight.grad * direction).sum() - difference).abs() <= 1e-3 * difference.abs()


@every_method
def test_the_loss_is_refused_where_tokens_are_taken_out(method: str) -> None:
    model = tiny_vlm("llava")
    batch = inputs(model)
    with llm_accel.apply(model, parse_all(method)), torch.enable_grad():
        if method in DROPPING:
            with pytest.raises(UnsupportedCallError, match="labels have one entry per token"):
                model(**batch, labels=batch["input_ids"])
        else:
            model(**batch, labels=batch["input_ids"]).loss.backward()
            assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
