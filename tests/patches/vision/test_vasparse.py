"""VASparse on whole models: equal to the oracle at every step, in every mode of generate, and gone without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import llm_accel
from llm_accel import ConfigError, DyVTE, FlowCut, HiP, RetrievalHeads, SnapKV, UnsupportedCallError, VASparse
from llm_accel.cache import GeneratedLayer
from tests.patches.calls import Outside, failing_once
from tests.tiny_vlm import FAMILIES, IMAGE, ONE, UNEQUAL, Scene, decode, inputs, require_mode, tiny_vlm
from tests.vasparse_oracle import replies

EXACT = 5e-4
STEPS = 11
# strong enough that every part changes the reply, and often enough that entries are pruned, summed and pruned again
STRONG: dict[str, Any] = {
    "alpha": 0.5,
    "beta": 0.3,
    "lam": 40.0,
    "keep": 0.5,
    "merge": 2,
    "plausibility": 0.01,
    "prune_every": 3,
    "protect_last": 1,
    "sink_window": 5,
}
OFF: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "keep": 1.0}


def spoken(model: PreTrainedModel, batch: dict[str, torch.Tensor], **changes: Any) -> Any:
    """What generate returns, with logits and scores."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "output_scores": True}
    return model.generate(**batch, **(options | changes), return_dict_in_generate=True)


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to rounding, and impossible tokens are the same ones."""
    possible = theirs.isfinite()
    close = torch.allclose(ours[possible].double(), theirs[possible], atol=EXACT)
    return close and torch.equal(ours.isfinite(), possible)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llava", {}),
        ("llava", {"sink_window": None, "saliency_head": "mean", "merge": None}),
        ("qwen2_5_vl", {"alpha": 0.0, "protect_last": 2}),
    ],
)
def test_every_step_equals_the_oracle(family: str, changes: dict[str, Any]) -> None:
    """Rows of different lengths, padded on the left; each as if alone."""
    model, method = tiny_vlm(family), VASparse(**(STRONG | changes))
    batch = inputs(model, UNEQUAL)
    with llm_accel.apply(model, method) as handle:
        output = spoken(model, batch)
        report = handle.report()
    prompt = batch["input_ids"].shape[1]
    for row, scene in enumerate(UNEQUAL):
        reply = output.sequences[row, prompt:]
        logits, scores = replies(model, inputs(model, [scene]), method, [reply], [])
        assert equal(torch.stack(output.logits, 1)[row], logits)
        assert equal(torch.stack(output.scores, 1)[row], scores)
    assert not torch.equal(output.sequences, spoken(model, batch).sequences)
    # after 9 of the 10 tokens that were looked back at, 5 stay; the rest is summed in twos, or gone
    stored = {layer.physical_length for layer in report.layers}
    assert stored == ({prompt + 5 + 1} if method.merge is None else {prompt + 5 + 2 + 1})
    assert {layer.logical_length for layer in report.layers} == {prompt + STEPS - 1}


def test_patches_that_left_and_tokens_that_leave() -> None:
    """FlowCut in the tower and DyVTE behind the second layer: no image is left in the third, the penalty is."""
    model, method = tiny_vlm(), VASparse(**STRONG)
    batch = inputs(model, ONE)
    exits, budget = DyVTE(exit=1), FlowCut(budget=6)
    with llm_accel.apply(model, budget):
        features = model.base_model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output[0]
    dropped = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    dropped[batch["input_ids"][0] == IMAGE] = features[:, -1].isnan()
    with llm_accel.apply(model, [budget, exits, method]) as handle:
        cache = handle.new_cache()
        output = spoken(model, batch, past_key_values=cache)
        assert [int(layer.visual.sum()) for layer in cache.layers] == [6, 6, 0]
    genuine = model.base_model.get_image_features

    def pruned(*args: Any, **kwargs: Any) -> Any:
        found = genuine(*args, **kwargs)
        found.pooler_output = [torch.where(features.isfinite(), features, 0.0).double()]
        return found

    model.base_model.get_image_features = pruned
    reply = output.sequences[0, len(dropped) :]
    logits, scores = replies(model, batch, method, [reply], [], dropped, exit=1)
    assert equal(torch.stack(output.logits, 1)[0], logits)
    assert equal(torch.stack(output.scores, 1)[0], scores)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 0}])
def test_search_modes_equal_the_oracle(mode: dict[str, Any]) -> None:
    model, method = tiny_vlm(), VASparse(**STRONG)
    # one image in each row: older versions of transformers mix up the images of others when rows are repeated
    scenes = (Scene(), Scene((2, 6), 6)) if "num_beams" in mode else ONE
    batch = inputs(model, scenes)
    torch.manual_seed(3)
    with llm_accel.apply(model, method):
        output = spoken(model, batch, **mode)
    prompt = batch["input_ids"].shape[1]
    for index, sequence in enumerate(output.sequences):
        alone = inputs(model, [scenes[index % len(scenes)]])
        _, scores = replies(model, alone, method, [sequence[prompt:]], [])
        taken = scores.gather(1, sequence[prompt:, None])[:, 0]
        if "num_beams" in mode:
            assert abs(float(output.sequences_scores[index]) - float(taken.mean())) < EXACT
        else:
            assert equal(torch.stack(output.scores, 1)[index], scores)


@pytest.mark.parametrize("full_ids", [True, False])
def test_second_turn_equals_the_oracle(full_ids: bool) -> None:
    """What was said belongs to the prompt of the next turn, and its tokens leave no more."""
    model, method = tiny_vlm(), VASparse(**STRONG)
    batch = inputs(model, ONE)
    question = torch.randint(3, IMAGE, (1, 7), generator=torch.Generator().manual_seed(9))
    with llm_accel.apply(model, method, trace=True) as handle:
        cache = handle.new_cache()
        first = spoken(model, batch, past_key_values=cache).sequences
        kept = [layer.positions.clone() for layer in cache.layers]
        history = torch.cat([first, question], dim=1)
        given = history if full_ids else history[:, cache.get_seq_length() :]
        mask = torch.ones_like(history)
        output = spoken(model, {"input_ids": given, "attention_mask": mask}, past_key_values=cache)
        for layer, before in zip(cache.layers, kept, strict=True):
            assert torch.equal(layer.positions[..., : before.shape[-1]], before)
            assert torch.equal(layer.positions, layer.positions.sort(-1).values)
    turns = [first[0, batch["input_ids"].shape[1] :], output.sequences[0, given.shape[1] :]]
    logits, scores = replies(model, batch, method, turns, [question[0]])
    assert equal(torch.stack(output.logits, 1)[0], logits[STEPS:])
    assert equal(torch.stack(output.scores, 1)[0], scores[STEPS:])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Everything off is the unpatched model to the bit, so is a text without an image, and nothing is left behind."""
    model = tiny_vlm(family)
    batch, text = inputs(model, UNEQUAL), inputs(model, [Scene((12,)), Scene((5,))])

    def scores(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(spoken(model, given, max_new_tokens=4).scores)

    outside, dense, plain = Outside.of(model), scores(batch), scores(text)
    for off in (OFF, OFF | {"keep": 0.5, "prune_every": 99}):
        with llm_accel.apply(model, VASparse(**off)):
            assert torch.equal(scores(batch), dense)
    with llm_accel.apply(model, VASparse(**(STRONG | {"prune_every": 2}))) as handle:
        assert not torch.equal(scores(batch), dense)
        assert torch.equal(scores(text), plain)
        assert handle.report().warnings == ["vasparse left this call alone: its prompt has no image"]
        with handle.disabled():
            assert torch.equal(scores(batch), dense)
    assert Outside.of(model) == outside
    assert torch.equal(scores(batch), dense)


def test_contrast_alone_changes_scores_only() -> None:
    """Its layers are the plain ones, and any other method may act on them."""
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    contrast = VASparse(**(OFF | {"alpha": 0.4, "plausibility": 0.0}))
    with llm_accel.apply(model, [SnapKV(budget=15, window=4, compress="deferred"), contrast]) as handle:
        cache = handle.new_cache()
        output = spoken(model, batch, past_key_values=cache, max_new_tokens=3)
        assert not any(isinstance(layer, GeneratedLayer) for layer in cache.layers)
        assert {layer.physical_length for layer in handle.report().layers} == {15 + 2}
    ids = torch.cat([batch["input_ids"][:, -1:], output.sequences[:, -3:-1]], dim=1)
    second = model.lm_head(model.get_input_embeddings()(ids))[0]
    for logits, scores, other in zip(output.logits, output.scores, second, strict=True):
        possible = scores[0].isfinite()
        wanted = (1.4 * logits[0] - 0.4 * other)[possible].log_softmax(-1)
        assert int(possible.sum()) == logits.shape[1] - 2 and torch.allclose(scores[0, possible], wanted, atol=1e-5)


def test_an_image_at_the_end_is_seen_or_not() -> None:
    """The second path starts from the newest token: one that it does not see is no embedding at all."""
    model = tiny_vlm()
    batch = inputs(model, [Scene((5, 0), 2)])
    features = model.base_model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output[0]
    for rate, newest in ((0.0, features[-1]), (1.0, torch.zeros_like(features[-1]))):
        with llm_accel.apply(model, VASparse(**(OFF | {"alpha": 1.0, "plausibility": 0.0, "mask_rate": rate}))):
            output = spoken(model, batch, max_new_tokens=1)
        wanted = 2 * output.logits[0][0] - model.lm_head(newest)
        possible = output.scores[0][0].isfinite()
        assert torch.allclose(output.scores[0][0, possible], wanted[possible].log_softmax(-1), atol=1e-4)


def test_chunks_equal_the_whole_prompt() -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    require_mode(model, batch, {"prefill_chunk_size": 7}, {})
    for window in (8, None):
        with llm_accel.apply(model, VASparse(**(STRONG | {"sink_window": window}))):
            whole, chunks = spoken(model, batch), spoken(model, batch, prefill_chunk_size=7)
        assert torch.equal(whole.sequences, chunks.sequences)
        assert all(torch.allclose(a, b, atol=EXACT) for a, b in zip(whole.logits, chunks.logits, strict=True))


def test_a_call_remembers_nothing_and_survives_a_failure() -> None:
    model = tiny_vlm()
    batch, other = inputs(model, ONE), inputs(model, [Scene((3, 8), 11)])
    with llm_accel.apply(model, VASparse(**STRONG)):
        once = spoken(model, batch).scores
        spoken(model, other)
        with failing_once(model.get_decoder().layers[1]):
            spoken(model, batch)
        assert all(map(torch.equal, spoken(model, batch).scores, once))
        twin = copy.deepcopy(model)
    assert all(map(torch.equal, spoken(twin, batch).scores, once))


def test_a_stored_cache_goes_on_where_it_was(tmp_path: Path) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    question = torch.randint(3, IMAGE, (1, 7), generator=torch.Generator().manual_seed(9))
    with llm_accel.apply(model, VASparse(**STRONG)) as handle:
        cache = handle.new_cache()
        first = spoken(model, batch, past_key_values=cache).sequences
        handle.save_cache(cache, tmp_path / "cache.safetensors")
        loaded, copied = handle.load_cache(tmp_path / "cache.safetensors"), copy.deepcopy(cache)
        ids = torch.cat([first, question], dim=1)
        further = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        scores = [spoken(model, further, past_key_values=one).scores for one in (cache, loaded, copied)]
        with pytest.raises(UnsupportedCallError, match="cannot be cropped"):
            cache.crop(-1)
    assert all(map(torch.equal, scores[0], scores[1])) and all(map(torch.equal, scores[0], scores[2]))


def test_received_is_the_column_sum_of_full_attention() -> None:
    """Eq. 7 with all queries: columns sum up to the number of queries in each head."""
    model, eager = tiny_vlm(), tiny_vlm(attention="eager")
    batch = inputs(model, ONE)
    maps = eager(**batch, output_attentions=True).attentions
    with llm_accel.apply(model, VASparse(sink_window=None)) as handle:
        cache = handle.new_cache()
        model(**batch, past_key_values=cache)
    for layer, full in zip(cache.layers, maps, strict=True):
        assert torch.allclose(layer.received, full.sum(2), atol=1e-4)
        assert torch.allclose(layer.received.sum(-1), torch.tensor(float(full.shape[2])), atol=1e-3)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([VASparse(), SnapKV(budget=40)], "snapkv:budget=40 would decide too.*only its contrast on"),
        ([VASparse(alpha=0.0), HiP()], "hip would decide too"),
        ([VASparse(), VASparse(alpha=0.2)], "both decode the answer"),
        ([VASparse(), RetrievalHeads()], "cannot be combined with vasparse"),
    ],
)
def test_refused_compositions(methods: list[Any], words: str) -> None:
    model = tiny_vlm()
    outside = Outside.of(model)
    with pytest.raises(ConfigError, match=words):
        llm_accel.apply(model, methods)
    assert Outside.of(model) == outside


def test_refused_calls() -> None:
    model = tiny_vlm()
    batch, text = inputs(model, ONE), inputs(model, [Scene((20,))])
    mixed = {name: torch.cat([batch[name][:, -20:], text[name]]) for name in text}
    mixed["input_ids"][0, :16] = IMAGE
    with llm_accel.apply(model, VASparse()):
        with pytest.raises(UnsupportedCallError, match="use_cache=False"):
            decode(model, batch, use_cache=False)
        with pytest.raises(UnsupportedCallError, match=r"prompt_lookup_num_tokens.*vasparse does not allow"):
            decode(model, batch, prompt_lookup_num_tokens=2)
        with pytest.raises(UnsupportedCallError, match="rows with and without one"):
            decode(model, mixed | {"pixel_values": batch["pixel_values"]})
        with pytest.raises(UnsupportedCallError, match="give input_ids instead of inputs_embeds"):
            model(inputs_embeds=torch.randn(1, 5, 32))
        labels = batch["input_ids"]
        assert model(**batch, labels=labels).loss.isfinite()  # no token of the prompt is gone
