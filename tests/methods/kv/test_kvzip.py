"""KVzip's score, its parts and its divisions, against what the paper says, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llm_accel
from llm_accel import ConfigError, KVzip
from llm_accel.common.bundled import load_needle_model
from llm_accel.methods import Lead, PassView, PromptView
from llm_accel.methods.kv import kvzip as module
from llm_accel.methods.kv.kvzip import around_text
from tests.tiny import tiny_model


def written_out(view: PassView, sinks: int) -> Tensor:
    """The largest probability of each entry of the part, query by query in float64."""
    batch, query_heads, count, _ = view.query.shape
    context = view.key.shape[2] - count
    per_key, per_kv = query_heads // view.key.shape[1], query_heads // view.kv_heads
    most = torch.zeros(batch, view.kv_heads, view.last - view.first, dtype=torch.float64)
    for row in range(batch):
        for head in range(query_heads):
            key = view.key[row, head // per_key].double()
            for place in range(count):
                seen = [slot for slot in range(min(sinks, view.first))]
                seen += list(range(view.first, view.last))
                seen += list(range(context, context + place + 1))
                logits = key[seen] @ view.query[row, head, place].double() * view.scaling
                if view.softcap is not None:
                    logits = torch.tanh(logits / view.softcap) * view.softcap
                if view.learned_sinks is not None:
                    logits = torch.cat([logits, view.learned_sinks[head : head + 1].double()])
                probability = logits.softmax(0)
                for slot in range(view.first, view.last):
                    found = probability[seen.index(slot)]
                    at = (row, head // per_kv, slot - view.first)
                    most[at] = max(most[at], found)
    return most


@pytest.mark.parametrize("part", [(0, 9), (2, 13), (9, 14)])
@pytest.mark.parametrize("shape", [(4, 2, 2), (4, 4, 1), (6, 2, 2), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"learned_sinks": True}], ids=str)
def test_the_score_is_the_papers(
    part: tuple[int, int], shape: tuple[int, int, int], more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_CPU", 600)  # one to three queries at once, so that there are several blocks
    query_heads, key_heads, kv_heads = shape
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, query_heads, 10, 8, generator=generator)
    key = torch.randn(2, key_heads, 14 + 10, 8, generator=generator)
    learned = torch.randn(query_heads, generator=generator) if "learned_sinks" in more else None
    softcap = more.get("softcap")
    view = PassView(query, key, kv_heads, *part, 0.7, softcap, learned)  # type: ignore[arg-type]
    before = query.clone(), key.clone()
    found = KVzip(sinks=4).pass_score(view)
    assert found.shape == (2, kv_heads, part[1] - part[0]) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), written_out(view, 4), atol=1e-6, rtol=1e-5)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


def test_parts_cover_the_context_once() -> None:
    assert KVzip(chunk=5).parts(0, 12) == [(0, 5), (5, 10), (10, 12)]
    assert KVzip(chunk=5).parts(3, 8) == [(3, 8)] and KVzip().parts(0, 2048) == [(0, 2048)]


def test_what_the_model_is_told() -> None:
    assert KVzip().lead() == Lead() and KVzip().tokenizer_use == "optional"
    assert KVzip(prompt=(5, 6)).lead() == Lead((5, 6), (5, 6)) and KVzip(prompt="none").tokenizer_use == "none"
    model, tokenizer = load_needle_model()
    lead = KVzip(prompt="text").lead(tokenizer)
    assert tokenizer.decode(lead.first).strip().startswith("Repeat the previous context") and lead.behind
    tokenizer.chat_template = "<S>{% for m in messages %}<U>{{ m['content'] }}</U>{% endfor %}<A>"
    assert around_text(tokenizer) == ("<S><U>", "</U><A>")
    for prompt in ("text", "auto"):
        with llm_accel.apply(model, "kvzip", prompt=prompt) as handle:
            said = handle.report().backends["repeat prompt"]
            assert said == (f"{len(lead.first)} tokens", "by the tokenizer that lies with the weights")
    with llm_accel.apply(tiny_model("llama"), "kvzip") as handle:
        assert handle.report().backends["repeat prompt"] == ("none", "the model was not loaded from a place")
    with pytest.raises(ConfigError, match="needs the tokenizer that lies with the weights"):
        llm_accel.apply(tiny_model("llama"), "kvzip", prompt="text")
    with pytest.raises(ConfigError, match="prompt has token 128; llama knows 0 to 127"):
        llm_accel.apply(tiny_model("llama"), "kvzip", prompt=(3, 128))
    with pytest.raises(ConfigError, match=r"prompt=.* is not allowed; give 'auto', 'text', 'none', or token ids"):
        KVzip(prompt=(-1,))


def layers_of(scores: list[Tensor], lengths: tuple[int, ...]) -> list[PromptView]:
    slots = scores[0].shape[2]
    start = torch.tensor([slots - length for length in lengths])
    none = torch.zeros(len(lengths), 1, 0, 2)
    return [
        PromptView(
            none,
            torch.zeros(*score.shape, 2),
            start=start if bool(start.any()) else None,
            scaling=1.0,
            softcap=None,
            sinks=None,
            kv_heads=score.shape[1],
            layer=index,
            layers=len(scores),
            scores=score,
        )
        for index, score in enumerate(scores)
    ]


def kept_by(config: KVzip, scores: list[Tensor], lengths: tuple[int, ...]) -> list[set[tuple[int, int, int]]]:
    """What stays in each row: layer, head, and place counted from the first real token."""
    slots = scores[0].shape[2]
    rows: list[set[tuple[int, int, int]]] = [set() for _ in lengths]
    for layer, kept in enumerate(config.select_all(layers_of(scores, lengths))):
        for row, length in enumerate(lengths):
            for head, entries in enumerate(kept[row].tolist()):
                found = [slot - (slots - length) for slot in entries if slot >= 0]
                assert found == sorted(set(found)) and all(0 <= place < length for place in found)
                rows[row] |= {(layer, head, place) for place in found}
    return rows


@pytest.mark.parametrize("lengths", [(40,), (40, 22, 40)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.7])
def test_each_division_keeps_the_best_of_those_that_share(lengths: tuple[int, ...], ratio: float) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = [torch.rand(len(lengths), 2, 40, generator=generator) for _ in range(3)]
    groups = {
        "global": [[(layer, head) for layer in range(3) for head in range(2)]],
        "layer": [[(layer, head) for head in range(2)] for layer in range(3)],
        "head": [[(layer, head)] for layer in range(3) for head in range(2)],
    }
    for division, shares in groups.items():
        config = KVzip(ratio=ratio, sinks=2, division=division)  # type: ignore[arg-type]
        for row, (length, found) in enumerate(zip(lengths, kept_by(config, scores, lengths), strict=True)):
            expected = set()
            for share in shares:
                worth = {
                    (layer, head, place): (place < 2, float(scores[layer][row, head, 40 - length + place]))
                    for layer, head in share
                    for place in range(length)
                }
                best = sorted(worth, key=worth.__getitem__, reverse=True)
                expected |= set(best[: len(share) * config.entries(length)])
            assert found == expected


@pytest.mark.parametrize("lengths", [(40,), (40, 22, 40)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.7])
def test_heads_keep_the_tokens_that_any_of_them_needs(lengths: tuple[int, ...], ratio: float) -> None:
    generator = torch.Generator().manual_seed(6)
    scores = [torch.rand(len(lengths), 2, 40, generator=generator) for _ in range(3)]
    config = KVzip(ratio=ratio, sinks=2, division="tokens")
    for row, (length, found) in enumerate(zip(lengths, kept_by(config, scores, lengths), strict=True)):
        worth = {
            (layer, place): (place < 2, float(scores[layer][row, :, 40 - length + place].max()))
            for layer in range(3)
            for place in range(length)
        }
        best = sorted(worth, key=worth.__getitem__, reverse=True)[: 3 * config.entries(length)]
        assert found == {(layer, head, place) for layer, place in best for head in range(2)}


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="4 sinks are always kept"):
        KVzip(budget=4)
    with pytest.raises(ConfigError, match="division='layers' is not allowed"):
        KVzip(division="layers")  # type: ignore[arg-type]
    assert KVzip(division="head").page_size is None and KVzip(division="global", page=8).page_size == 8
    assert KVzip().page_size is None
