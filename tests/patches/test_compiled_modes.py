"""Compiled decoding in every mode of autograd: buffers are pooled, and go from a call in one mode to one in another."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel.registry import configure, parse_all
from tests.contracts.test_autograd_modes import MODES, check_same, talk
from tests.contracts.variants import every_compiled_variant
from tests.patches.conftest import Counting
from tests.patches.test_compiled_decode import shallow
from tests.tiny import left_padded

LENGTHS = (60, 41)


def model_for(method: str) -> PreTrainedModel:
    """As few layers as show all: each of them is traced."""
    return shallow(layers=3 if method.startswith("retrieval") else 2 if method.startswith("pyramid") else 1)


@every_compiled_variant
def test_pooled_buffers_and_caches_go_from_mode_to_mode(method: str, counting: Counting) -> None:
    model, (ids, mask) = model_for(method), left_padded(list(LENGTHS))
    config, options = parse_all(method) or configure("dense", {}), {"max_new_tokens": 6, "do_sample": False}
    with llm_accel.apply(model, config) as handle:
        plain = talk(model, handle.new_cache(), LENGTHS, ("no_grad",) * 4)
        tokens = model.generate(ids, attention_mask=mask, **options)
    with llm_accel.apply(model, config, decode="compiled") as handle:
        for mode in ("inference", "no_grad", "inference"):
            with MODES[mode]():
                assert torch.equal(model.generate(ids, attention_mask=mask, **options), tokens)
            assert counting.runs > 0
        check_same(talk(model, handle.new_cache(), LENGTHS, ("no_grad", "inference", "no_grad", "inference")), plain)


@every_compiled_variant
def test_with_gradients_on_steps_are_eager_and_the_cache_goes_on(method: str, counting: Counting) -> None:
    model, config = model_for(method), parse_all(method) or configure("dense", {})
    with llm_accel.apply(model, config, decode="compiled") as handle:
        plain = talk(model, handle.new_cache(), LENGTHS, ("no_grad",) * 4)
        ran = counting.runs
        check_same(talk(model, handle.new_cache(), LENGTHS, ("inference", "grad", "grad", "grad")), plain)
        assert counting.runs == ran
        check_same(talk(model, handle.new_cache(), LENGTHS, ("grad", "inference", "grad", "no_grad")), plain)
        assert counting.runs > ran
