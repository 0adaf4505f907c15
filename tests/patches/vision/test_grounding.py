"""VHR, PAINT and VAR on whole models: equal to the oracle at every step, alone and with methods that drop tokens and
evict entries, in batches and later turns; off they are the model to the bit, and nothing is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import PAINT, VAR, VHR, FlowCut, SnapKV
from llm_accel.methods import Grounding, MethodConfig
from llm_accel.report import Report
from tests.grounding_oracle import Dialogue, logits_of
from tests.patches.calls import Outside, failing_once
from tests.tiny_vlm import FAMILIES, IMAGE, ONE, UNEQUAL, Scene, inputs, require_mode, tiny_vlm

EXACT = 5e-4
STEPS = 5
# strong, and in more layers than the defaults of so shallow a model
VHR_ON = VHR(alpha=1.7, layers=(0, 1, 2))
PAI = PAINT(alpha=0.4, beta=0.4, local=1.0, first_layer=0)
PAINT_ON = PAINT(alpha=0.6, beta=0.2, local=0.4, first_layer=1)
VAR_ON = VAR(dims=(1, 5, 7, 9, 20), tau=2.0, least=0.05, rho=0.1, first_layer=0)
METHODS = (VHR_ON, PAI, PAINT_ON, VAR_ON)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.spec()[-8:]}")


def spoken(model: PreTrainedModel, batch: dict[str, Tensor], **changes: Any) -> Any:
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    return model.generate(**batch, **(options | changes), return_dict_in_generate=True)


class Entering:
    """Records what enters the decoder in calls that bring a prompt, after methods have taken rows out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self.hook = model.get_decoder().register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, decoder: object, args: object, kwargs: dict[str, Any]) -> None:
        if "llm_accel" in kwargs:
            visual = kwargs["llm_accel"].visual
            rows = visual.rows
            if rows is not None:
                self.calls.append(
                    {
                        "rows": kwargs["inputs_embeds"].clone(),
                        "positions": kwargs.get("position_ids"),
                        "real": rows.real.clone(),
                        "visual": rows.visual.clone(),
                        "marks": None if rows.marks is None else rows.marks.clone(),
                        "index": rows.index,
                    }
                )


def dialogue_of(model: PreTrainedModel, calls: list[dict[str, Any]], replies: list[Tensor], row: int) -> Dialogue:
    """One row of a batch from what entered the decoder at each prompt, and what was said after it."""
    embed, pieces = model.get_input_embeddings(), []
    for call, reply in zip(calls, replies, strict=True):
        real = call["real"][row]
        count = int(real.sum())
        rows = call["rows"][row, -count:]
        positions = call["positions"]
        if positions is None:
            past = sum(len(piece["rows"]) for piece in pieces)
            positions = torch.arange(past, past + call["rows"].shape[1])[None]
        positions = positions[..., min(row, positions.shape[-2] - 1), :][..., -count:]
        visual = call["visual"][row, -count:]
        marks = visual.long() if call["marks"] is None else call["marks"][row, -count:].long()
        end = torch.zeros(count, dtype=torch.bool)
        end[-1] = True
        pieces.append({"rows": rows, "positions": positions, "visual": visual, "marks": marks, "last": end})
        said = reply[:-1]
        more = positions[..., -1:] + torch.arange(1, len(said) + 1)
        none = torch.zeros(len(said), dtype=torch.bool)
        pieces.append({"rows": embed(said), "positions": more, "visual": none, "marks": none.long(), "last": ~none})
    spoken = torch.cat([torch.full((len(p["rows"]),), i % 2 == 1) for i, p in enumerate(pieces)])
    joined = {name: torch.cat([p[name] for p in pieces], 0) for name in ("visual", "marks", "last")}
    parts = [p["positions"] for p in pieces]
    axes = max((part.shape[0] for part in parts if part.ndim > 1), default=0)  # later turns may come with one
    positions = torch.cat([part.expand(axes, -1) if axes else part for part in parts], -1)
    return Dialogue(
        torch.cat([p["rows"] for p in pieces])[None].detach(),
        positions[..., None, :],
        joined["visual"],
        spoken,
        joined["last"],
        joined["marks"],
    )


def check(model: PreTrainedModel, batch: dict[str, Tensor], methods: list[MethodConfig]) -> Report:
    """One turn of a batch against the oracle, row by row; what the report said."""
    with llm_accel.apply(model, methods, trace=True) as handle:
        entering = Entering(model)
        output = spoken(model, batch)
        entering.hook.remove()
        report = handle.report()
    prompt = batch["input_ids"].shape[1]
    for row in range(len(batch["input_ids"])):
        reply = output.sequences[row, prompt:]
        dialogue = dialogue_of(model, entering.calls, [reply], row)
        count = int(entering.calls[0]["real"][row].sum())
        index = entering.calls[0]["index"]
        dialogue.hidden = hidden(report, row, count, len(dialogue.visual), index)
        wanted = logits_of(model, dialogue, methods, count)[dialogue.last]
        got = torch.stack(output.logits, 1)[row].double()
        assert torch.allclose(got, wanted, atol=EXACT), float((got - wanted).abs().max())
    return report


def hidden(report: Report, row: int, count: int, length: int, index: Tensor | None) -> dict[int, Tensor]:
    """What queries after the prompt no longer find, from the positions that each layer says it kept."""
    found = {}
    for layer in report.layers:
        if layer.kept is None or not layer.evicted:
            continue
        tokens = torch.arange(count)
        if index is not None:  # rows that were taken out leave gaps in the positions
            tokens = index[row][index[row] >= 0]
            tokens = tokens - tokens[0]
        gone = torch.zeros(layer.kept.shape[1], length, length, dtype=torch.bool)
        for head, kept in enumerate(layer.kept[row].tolist()):
            lost = torch.tensor([int(token) not in set(kept) for token in tokens])
            gone[head, count:, :count] = lost
        found[layer.layer] = gone
    return found


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_step_equals_the_oracle(family: str, method: Grounding) -> None:
    """Rows of different lengths, padded on the left; each as if alone."""
    model = tiny_vlm(family)
    batch = inputs(model, UNEQUAL)
    check(model, batch, [method])
    with llm_accel.apply(model, method):
        changed = torch.stack(spoken(model, batch).logits)
    assert not torch.allclose(changed, torch.stack(spoken(model, batch).logits), atol=1e-2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [VHR_ON, PAI, VAR_ON], ids=lambda method: method.name)
def test_beside_tokens_that_left_and_entries_that_were_evicted(family: str, method: Grounding) -> None:
    """FlowCut, then SnapKV: later queries see the kept entries of each KV head, and so do marks."""
    model = tiny_vlm(family)
    cut = FlowCut(ratio=0.6)
    report = check(model, inputs(model, UNEQUAL), [cut, SnapKV(budget=12, window=4), method])
    assert report.visual_tokens_after < report.visual_tokens_before
    assert all(layer.evicted for layer in report.layers)


def test_paint_beside_tokens_that_left_in_the_tower() -> None:
    """Attention of the last layer is known of the patches that are left; the marks of others go with them."""
    model = tiny_vlm()
    for compress in ("eager", "deferred"):
        report = check(
            model,
            inputs(model, UNEQUAL),
            [FlowCut(ratio=0.6), SnapKV(budget=12, window=4, compress=compress), PAINT_ON],
        )
        assert sum(report.layers[1].grounding["local"]) > 0


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_second_turn_equals_the_oracle(family: str, method: Grounding) -> None:
    """Heads stay those of the first prompt; the question of the second turn is corrected as the first one was."""
    model = tiny_vlm(family)
    batch = inputs(model, ONE)
    question = torch.randint(3, IMAGE, (1, 7), generator=torch.Generator().manual_seed(9))
    with llm_accel.apply(model, method) as handle:
        entering = Entering(model)
        cache = handle.new_cache()
        first = spoken(model, batch, past_key_values=cache)
        history = torch.cat([first.sequences, question], dim=1)
        mask = torch.ones_like(history)
        second = spoken(model, {"input_ids": history, "attention_mask": mask}, past_key_values=cache)
        entering.hook.remove()
    replies = [first.sequences[0, batch["input_ids"].shape[1] :], second.sequences[0, history.shape[1] :]]
    dialogue = dialogue_of(model, entering.calls, replies, 0)
    count = batch["input_ids"].shape[1]
    wanted = logits_of(model, dialogue, [method], count)[dialogue.last]
    got = torch.stack([*first.logits, *second.logits], 1)[0].double()
    assert torch.allclose(got, wanted, atol=EXACT)


@pytest.mark.parametrize("options", [{"both": False}, {"discard": False}, {"layers": (1,)}], ids=str)
def test_vhr_options(options: dict[str, Any]) -> None:
    model = tiny_vlm()
    check(model, inputs(model, UNEQUAL), [VHR(**({"alpha": 1.7, "layers": (0, 1, 2)} | options))])


OFF = (VHR(alpha=1.0), PAINT(alpha=0.0, beta=0.0), VAR(remove=0.0, dims=(3,)), VAR(dims=()), VAR(dims=(3,), tau=1e5))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Switched off, or where no sink is, the model to the bit; so is a text without an image. Nothing is left."""
    model = tiny_vlm(family)
    batch, text = inputs(model, UNEQUAL), inputs(model, [Scene((12,)), Scene((5,))])

    def logits(given: dict[str, Tensor]) -> Tensor:
        return torch.stack(spoken(model, given, max_new_tokens=3).logits)

    outside, dense, plain = Outside.of(model), logits(batch), logits(text)
    for off in OFF:
        with llm_accel.apply(model, off):
            assert torch.equal(logits(batch), dense)
    for method in METHODS:
        with llm_accel.apply(model, method) as handle:
            assert not torch.equal(logits(batch), dense)
            assert any(layer.grounding for layer in handle.report().layers)
            assert torch.equal(logits(text), plain)
            assert handle.report().warnings == [f"{method.name} left this call alone: its prompt has no image"]
            with handle.disabled():
                assert torch.equal(logits(batch), dense)
        assert Outside.of(model) == outside
    assert torch.equal(logits(batch), dense)


@every_method
def test_rows_with_and_without_an_image(method: Grounding) -> None:
    model = tiny_vlm()
    batch, text = inputs(model, ONE), inputs(model, [Scene((9,))])
    length = batch["input_ids"].shape[1]
    padded = {name: torch.nn.functional.pad(rows, (length - rows.shape[1], 0)) for name, rows in text.items()}
    both = {name: torch.cat([batch[name], padded[name]]) for name in padded} | {"pixel_values": batch["pixel_values"]}
    plain = torch.stack(spoken(model, text).logits)
    with llm_accel.apply(model, method):
        alone, together = torch.stack(spoken(model, batch).logits), torch.stack(spoken(model, both).logits)
    assert torch.allclose(together[:, :1], alone, atol=EXACT)
    assert torch.allclose(together[:, 1:], plain, atol=EXACT)


@every_method
def test_every_backend_gives_the_same(method: Grounding) -> None:
    batch = inputs(tiny_vlm(), UNEQUAL)
    found = []
    for attention in ("sdpa", "eager"):
        model = tiny_vlm(attention=attention)
        with llm_accel.apply(model, method):
            found.append(torch.stack(spoken(model, batch).logits))
    assert torch.allclose(found[0], found[1], atol=EXACT)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@every_method
def test_search_modes(method: Grounding, mode: dict[str, Any]) -> None:
    """What is said of a row is that of the same row alone, given its tokens."""
    model = tiny_vlm()
    batch = inputs(model, (Scene(), Scene((2, 6), 6)))
    torch.manual_seed(3)
    with llm_accel.apply(model, method):
        output = spoken(model, batch, output_scores=True, **mode)
        prompt, copies = batch["input_ids"].shape[1], len(output.sequences) // 2
        for index, sequence in enumerate(output.sequences):
            scene = (Scene(), Scene((2, 6), 6))[index // copies]
            alone = inputs(model, [scene])
            forced = Forced(sequence[prompt:])
            again = spoken(model, alone, logits_processor=[forced])
            assert torch.equal(again.sequences[0, -STEPS:], sequence[prompt:])
            if "num_beams" not in mode:
                rows = torch.stack(output.logits, 1)[index]
                assert torch.allclose(rows, torch.stack(again.logits, 1)[0], atol=EXACT)
            else:
                paid = torch.stack(again.logits, 1)[0].log_softmax(-1).gather(1, sequence[prompt:, None]).mean()
                assert abs(float(paid) - float(output.sequences_scores[index])) < EXACT


class Forced:
    """Chooses given tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.tokens[self.step]] = 0.0
        self.step += 1
        return chosen


@pytest.mark.parametrize("method", [PAI, VAR_ON], ids=lambda method: method.name)
def test_chunks_equal_the_whole_prompt(method: Grounding) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    require_mode(model, batch, {"prefill_chunk_size": 7}, {})
    with llm_accel.apply(model, method):
        whole, chunks = spoken(model, batch), spoken(model, batch, prefill_chunk_size=7)
    assert torch.equal(whole.sequences, chunks.sequences)
    assert all(torch.allclose(a, b, atol=EXACT) for a, b in zip(whole.logits, chunks.logits, strict=True))


@every_method
def test_a_call_remembers_nothing_and_survives_a_failure(method: Grounding) -> None:
    model = tiny_vlm()
    batch, other = inputs(model, ONE), inputs(model, [Scene((3, 8), 11)])
    with llm_accel.apply(model, method):
        once = spoken(model, batch).logits
        spoken(model, other)
        with failing_once(model.get_decoder().layers[1]):
            spoken(model, batch)
        assert all(map(torch.equal, spoken(model, batch).logits, once))
        twin = copy.deepcopy(model)
    assert all(map(torch.equal, spoken(twin, batch).logits, once))


@every_method
def test_a_stored_cache_goes_on_where_it_was(method: Grounding, tmp_path: Path) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    with llm_accel.apply(model, [SnapKV(budget=15, window=4), method]) as handle:
        cache = handle.new_cache()
        first = spoken(model, batch, past_key_values=cache).sequences
        handle.save_cache(cache, tmp_path / "cache.safetensors")
        loaded, copied = handle.load_cache(tmp_path / "cache.safetensors"), copy.deepcopy(cache)
        further = torch.cat([first, torch.randint(3, IMAGE, (1, 6))], dim=1)
        given = {"input_ids": further, "attention_mask": torch.ones_like(further)}
        logits = [spoken(model, given, past_key_values=one).logits for one in (cache, loaded, copied)]
    assert all(map(torch.equal, logits[0], logits[1])) and all(map(torch.equal, logits[0], logits[2]))


@every_method
def test_a_cropped_cache_goes_back(method: Grounding) -> None:
    model, batch = tiny_vlm(), inputs(tiny_vlm(), ONE)
    with llm_accel.apply(model, method) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(**batch, past_key_values=cache)
        token = torch.tensor([[7]])
        once = model(input_ids=token, past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, once)
