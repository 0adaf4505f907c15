"""``backward`` through a model with the plug-in: right, or refused with our error, for every method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from llm_accel import UnsupportedCallError
from tests.contracts.laws import EXACT
from tests.contracts.matrix import LONG, SHORT
from tests.contracts.test_autograd_modes import applied
from tests.contracts.variants import ADAKV, HIP, LAMBDA, VARIANTS, WINDOW, every_variant
from tests.tiny import left_padded, prompt, tiny_model

# attention in these has kernels without a gradient, once the prompt is longer than what they read of it
SPARSE = (HIP, LAMBDA, WINDOW)
# and in these once something was evicted
RAGGED = (ADAKV, ADAKV + ",across=model")
UNIFORM = VARIANTS[-1]  # its outputs are not those of the dense model


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """In float64 throughout: norms that compute in fp32 would drown finite differences in rounding."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon, dtype=torch.float64)
            model.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], norm)
    return model


def conversation(model: PreTrainedModel, cache: DynamicCache, embeds: Tensor) -> Tensor:
    """A number that depends on all logits of a prompt, of some decode steps and of a second turn on one cache."""
    embed, generator = model.get_input_embeddings(), torch.Generator().manual_seed(3)
    later = [*prompt(3, 5).split(1, 1), prompt(9, 6), *prompt(3, 7).split(1, 1)]
    total = embeds.new_zeros(())
    for part in (embeds, *(embed(tokens) for tokens in later)):
        logits = model(inputs_embeds=part, past_key_values=cache).logits
        total = total + (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()
    return total


@every_variant
def test_gradients_of_a_conversation_are_its_finite_differences(method: str) -> None:
    """Through everything that is kept, moved and overwritten; what is kept is a constant."""
    model, step = exact(tiny_model("llama")), 1e-5
    embeds = model.get_input_embeddings()(prompt(60)).detach()
    direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(9), dtype=embeds.dtype)
    with applied(model, method) as handle:
        given = embeds.clone().requires_grad_()
        total = conversation(model, handle.new_cache(), given)
        if method in (*SPARSE, *RAGGED):
            with pytest.raises(UnsupportedCallError, match=r"has no gradient here.*handle\.disabled\(\)"):
                total.backward()
            return
        total.backward()
        with torch.no_grad():
            ahead, behind = (
                conversation(model, handle.new_cache(), embeds + sign * step * direction) for sign in (1, -1)
            )
    assert given.grad is not None
    slope, difference = (given.grad * direction).sum(), (ahead - behind) / (2 * step)
    assert (slope - difference).abs() <= 1e-5 * difference.abs()


def gradients(model: PreTrainedModel, lengths: list[int], **options: Any) -> dict[str, Tensor]:
    """Of the loss of a padded batch, for its embeddings and for all parameters."""
    ids, mask = left_padded(lengths)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.zero_grad()
    labels = ids.masked_fill(mask == 0, -100)
    model(inputs_embeds=embeds, attention_mask=mask, labels=labels, **options).loss.backward()
    assert embeds.grad is not None
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"embeds": embeds.grad}


def check_equal(ours: dict[str, Tensor], dense: dict[str, Tensor]) -> None:
    assert ours.keys() == dense.keys()
    for name, gradient in ours.items():
        assert (gradient - dense[name]).abs().max() <= EXACT * (1 + dense[name].abs().max()), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("lengths", [[SHORT, 7], [LONG, 41]], ids=["below_budget", "above_budget"])
@every_variant
def test_the_loss_of_one_call_has_the_gradients_of_the_dense_model(
    method: str, lengths: list[int], use_cache: bool | None, training: bool
) -> None:
    """Layers see what they would without the plug-in until the prompt is complete; in training nothing acts at all,
    and without a cache no head streams."""
    model = tiny_model("llama").train(training)
    dense = gradients(copy.deepcopy(model), lengths, use_cache=use_cache)
    acts = not training and max(lengths) == LONG and not (method == LAMBDA and use_cache is False)
    with applied(model, method):
        if acts and method in SPARSE:
            with pytest.raises(UnsupportedCallError, match=r"has no gradient"):
                gradients(model, lengths, use_cache=use_cache)
        elif method != UNIFORM or training:
            check_equal(gradients(model, lengths, use_cache=use_cache), dense)
        else:
            assert gradients(model, lengths, use_cache=use_cache).keys() == dense.keys()


@every_variant
def test_a_refused_gradient_leaves_the_model_usable(method: str) -> None:
    model, ids = tiny_model("llama"), prompt(LONG)
    with applied(model, method):
        with torch.no_grad():
            before = model(ids).logits
        after = model(ids)
        assert torch.equal(after.logits, before)  # gradients being recorded changes no bit
        if method in SPARSE:
            with pytest.raises(UnsupportedCallError):
                after.logits.sum().backward()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
