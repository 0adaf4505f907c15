"""Visual tokens leave, then KV entries: each stage works on exactly the rows that the one before it left.

The reference cuts the decoder into pieces at the layers where rows leave, takes the rows out by hand between them, and
applies the KV method alone to each piece, which to it is a text model.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import llm_accel
from llm_accel import H2O, DyVTE, FastV, FlowCut, HiP, RetrievalHeads, SnapKV
from llm_accel.methods import MethodConfig
from tests.tiny_vlm import IMAGE, UNEQUAL, decode, inputs, tiny_vlm
from tests.vision_oracle import decoder_inputs

EXACT = 2e-4
STEPS = 6
FLOWCUT = FlowCut(budget=5)
KV = (SnapKV(budget=12, window=4), H2O(budget=10))


def piece(model: PreTrainedModel, first: int, last: int) -> Any:
    """The decoder's layers from ``first`` to before ``last`` as a model of their own; the norm belongs to the last."""
    part = copy.deepcopy(model.get_decoder())
    part.config.num_hidden_layers = last - first
    part.layers = part.layers[first:last]
    for index, layer in enumerate(part.layers):
        layer.self_attn.layer_idx = index
    if last < len(model.get_decoder().layers):
        part.norm = torch.nn.Identity()
    return part


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel, given: dict[str, Any], leaves: list[tuple[int, Tensor]], method: MethodConfig | None
) -> Tensor:
    """Greedy logits [STEPS, vocabulary] after the decoder's inputs of one row. ``leaves``: from which layer on the
    decoder goes on without which rows, bool [T] of the whole prompt, each a superset of the one before."""
    layers = len(model.get_decoder().layers)
    rows, positions = given["inputs_embeds"], given["position_ids"]
    bounds = [layer for layer, _ in leaves] + [layers]
    parts = [piece(model, first, last) for first, last in pairwise(bounds)]
    caches = [DynamicCache() for _ in parts]
    for part in parts:
        if method is not None:
            llm_accel.apply(part, method)
    here, logits = torch.ones(rows.shape[1], dtype=torch.bool), []
    for part, cache, (_, gone) in zip(parts, caches, leaves, strict=True):
        rows, positions = rows[:, ~gone[here]], positions[:, ~gone[here]]
        here = here & ~gone
        mask = torch.ones_like(positions)
        rows = part(
            inputs_embeds=rows, position_ids=positions, attention_mask=mask, past_key_values=cache
        ).last_hidden_state
    for step in range(STEPS):
        logits.append(model.lm_head(rows[:, -1])[0])
        banned = torch.tensor(model.generation_config.suppress_tokens)
        token = logits[-1].index_fill(0, banned, float("-inf")).argmax()[None, None]
        rows = model.get_input_embeddings()(token)
        position = given["position_ids"][:, -1:] + 1 + step
        for part, cache in zip(parts, caches, strict=True):
            rows = part(inputs_embeds=rows, position_ids=position, past_key_values=cache).last_hidden_state
    return torch.stack(logits)


def check(methods: list[MethodConfig], exit: int | None, kv: MethodConfig | None) -> Any:
    """A left-padded batch under ``methods``, in both orders, against each row in pieces; returns the report."""
    model = tiny_vlm()
    batch = inputs(model, UNEQUAL)
    with llm_accel.apply(model, methods) as handle:
        logits, report = decode(model, batch)[1], handle.report()
    with llm_accel.apply(model, methods[::-1]):
        assert torch.equal(decode(model, batch)[1], logits)
    for row, scene in zip(logits, UNEQUAL, strict=True):
        alone = inputs(model, [scene])
        visual = alone["input_ids"][0] == IMAGE
        given, gone = decoder_inputs(model, alone), torch.zeros_like(visual)
        if FLOWCUT in methods:  # it cuts inside the tower, which changes the features of what stays
            with llm_accel.apply(model, FLOWCUT):
                features = torch.cat(model.base_model.get_image_features(alone["pixel_values"]).pooler_output)
            given["inputs_embeds"][0, visual] = features
            gone[visual] = features[:, 0].isinf()
        leaves = [(0, gone)] + ([] if exit is None else [(exit + 1, visual)])
        assert torch.allclose(row, in_pieces(model, given, leaves, kv), atol=EXACT)
    return report


@pytest.mark.parametrize("kv", KV, ids=lambda kv: kv.name)
def test_exit_and_entries(kv: MethodConfig) -> None:
    """Layers up to the exit choose among all tokens, those behind it among text alone."""
    report = check([DyVTE(exit=1), kv], 1, kv)
    assert (report.exit_layer, report.visual_tokens_after) == (1, 0)


@pytest.mark.parametrize("kv", KV, ids=lambda kv: kv.name)
def test_patches_and_entries(kv: MethodConfig) -> None:
    report = check([FLOWCUT, kv], None, kv)
    assert (report.visual_tokens_before, report.visual_tokens_after) == (48, 15)


def test_patches_and_exit() -> None:
    """All layers lack the patches; those behind the exit lack the rest."""
    report = check([FLOWCUT, DyVTE(exit=0)], 0, None)
    assert (report.exit_layer, report.visual_tokens_before, report.visual_tokens_after) == (0, 48, 0)


def test_three_stages() -> None:
    check([FLOWCUT, DyVTE(exit=0), KV[0]], 0, KV[0])


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([DyVTE(exit=1), FastV()], "dyvte:exit=1.0 and fastv both let visual tokens leave after a layer"),
        ([DyVTE(exit=1), SnapKV(), H2O()], "snapkv and h2o both decide which KV entries stay"),
        ([DyVTE(exit=1), RetrievalHeads(head_list=("0.0",))], "cannot be combined with dyvte"),
        ([DyVTE(exit=1), HiP(), H2O()], "hip reads entries in the order of their positions"),
    ],
)
def test_what_makes_no_sense_together(methods: list[MethodConfig], words: str) -> None:
    with pytest.raises(llm_accel.ConfigError, match=words):
        llm_accel.apply(tiny_vlm(), methods)
