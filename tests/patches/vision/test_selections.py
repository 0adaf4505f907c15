"""DivPrune, CDPruner, PruneSID and DART on whole models: what stays is what the oracle keeps, and the rest equals rows
that were taken out, or keys that were hidden, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import DART, CDPruner, DivPrune, PruneSID, SnapKV, UnsupportedCallError
from llm_accel.methods import MethodConfig
from tests.patches.calls import Outside
from tests.selection_oracle import cdpruner, dart, divprune, prunesid
from tests.tiny_vlm import FAMILIES, IMAGE, ONE, UNEQUAL, decode, inputs, require_mode, tiny_vlm
from tests.vision_oracle import decoder_inputs, hidden, layers_of, removed

EXACT = 2e-4
RATIO = 0.4
every_family = pytest.mark.parametrize("family", FAMILIES)
METHODS = (
    DivPrune(ratio=RATIO),
    CDPruner(budget=6),
    PruneSID(ratio=RATIO),
    DART(ratio=RATIO, layer=1, visual_pivots=2, text_pivots=2),
)


def wanted(model: PreTrainedModel, batch: dict[str, Tensor], method: MethodConfig) -> Tensor:
    """Which tokens of one row leave, bool [T]."""
    given = decoder_inputs(model, batch)
    rows, visual = given["inputs_embeds"][0].detach(), batch["input_ids"][0] == IMAGE
    tokens = visual.nonzero()[:, 0]
    kept = method.tokens(len(tokens))  # type: ignore[attr-defined]
    if isinstance(method, DivPrune):
        stay = tokens[divprune(rows[tokens], kept)]
    elif isinstance(method, CDPruner):
        stay = tokens[cdpruner(rows[tokens], rows[~visual], kept)]
    elif isinstance(method, PruneSID):
        stay = tokens[prunesid(rows[tokens], kept)]
    else:
        states, norms = behind_first(model, given)
        stay = torch.tensor(dart(states, norms, visual, kept, 2, 2))
    gone = visual.clone()
    gone[stay] = False
    return gone


def behind_first(model: PreTrainedModel, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the first layer returns, [T, C], and the norms of its keys, [T], before positions turn them."""
    layer, seen = layers_of(model)[0], {}

    def keys(module: object, args: object, output: Tensor) -> None:
        seen["keys"] = output

    def states(module: object, args: object, output: Any) -> None:
        seen["states"] = output[0] if isinstance(output, tuple) else output

    hooks = [layer.self_attn.k_proj.register_forward_hook(keys), layer.register_forward_hook(states)]
    mask = torch.ones(given["inputs_embeds"].shape[:2], dtype=torch.long)
    with torch.no_grad():
        model.get_decoder()(**given, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = seen["keys"][0].unflatten(-1, (-1, layer.self_attn.head_dim))
    return seen["states"][0], heads.norm(dim=-1).mean(-1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "internvl"])
def test_rows_equal_the_oracle(family: str, method: MethodConfig) -> None:
    """Rows of different lengths, padded on the left, each as if alone; newlines of tiles count as visual tokens."""
    model = tiny_vlm(family)
    with llm_accel.apply(model, method) as handle:
        _, logits = decode(model, inputs(model, UNEQUAL))
        report = handle.report()
    left = 0
    for row, scene in enumerate(UNEQUAL):
        alone = inputs(model, [scene])
        gone = wanted(model, alone, method)
        left += int((alone["input_ids"][0] == IMAGE).sum() - gone.sum())
        reference = hidden(model, alone, gone, 0) if isinstance(method, DART) else removed(model, alone, gone)
        assert torch.allclose(logits[row], reference, atol=EXACT), (logits[row] - reference).abs().max()
    assert report.visual_tokens_after == left < report.visual_tokens_before


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "prunesid", "dart:layer=2"])
@every_family
def test_nothing_to_drop_and_exact_undo(family: str, name: str) -> None:
    model = tiny_vlm(family)
    batch, separator = inputs(model, UNEQUAL), "," if ":" in name else ":"
    dense, outside = decode(model, batch), Outside.of(model)
    with llm_accel.apply(model, f"{name}{separator}ratio=1.0"):
        assert torch.equal(decode(model, batch)[1], dense[1])
    with llm_accel.apply(model, f"{name}{separator}ratio=0.3") as handle:
        assert not torch.equal(decode(model, batch)[1], dense[1])
        report = handle.report()
        assert report.visual_tokens_after < report.visual_tokens_before
    assert Outside.of(model) == outside
    assert torch.equal(decode(model, batch)[1], dense[1])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_later_turns_and_entries_that_are_evicted(method: MethodConfig) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    with llm_accel.apply(model, [method, SnapKV(budget=12, window=4)]) as handle:
        cache = handle.new_cache()
        first = model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
        further = torch.cat([first, torch.randint(3, IMAGE, (1, 6))], dim=1)
        again = model.generate(
            input_ids=further, attention_mask=torch.ones_like(further), past_key_values=cache, max_new_tokens=4
        )
        report = handle.report()
    assert again.shape[1] == further.shape[1] + 4
    assert {layer.logical_length for layer in report.layers} == {again.shape[1] - 1}
    assert all(layer.evicted for layer in report.layers)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda method: method.name)
def test_chunks_are_refused(method: MethodConfig) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    require_mode(model, batch, {"prefill_chunk_size": 7}, {})
    with llm_accel.apply(model, method), pytest.raises(UnsupportedCallError, match="comes in chunks"):
        decode(model, batch, prefill_chunk_size=7)
