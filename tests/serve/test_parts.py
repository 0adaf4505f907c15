"""The parts that need no server: text in pieces, choice of tokens, batches from a queue."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from llm_accel.methods import MethodConfig, SnapKV
from llm_accel.serve.detokenizer import Detokenizer
from llm_accel.serve.sampling import Sampling, choose
from llm_accel.serve.scheduler import Scheduler
from llm_accel.serve.sequences import Job
from llm_accel.serve.settings import ServeSettings
from tests.eval.needle_helpers import tokenizer


@pytest.mark.parametrize("kind", ["bundled", "spaces"])
def test_pieces_join_to_the_decoded_text(kind: str) -> None:
    coder, rng = tokenizer(kind), random.Random(0)
    texts = ["The dog watched 12 345 rivers. ", "é日本😀", " ", "</s>"]
    for _ in range(60):
        ids = coder.encode("".join(rng.choices(texts, k=6)), add_special_tokens=False)
        ids += [rng.randrange(len(coder)) for _ in range(rng.randrange(6))]
        stream = Detokenizer(coder)
        pieces = [stream.push(token) for token in ids] + [stream.flush()]
        expected = coder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == expected
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


@pytest.mark.parametrize(
    "stops", [["river"], ["x", "rivers. T"], ["."], ["watched the old"], ["The"], ["not there", "s. The "]]
)
def test_text_ends_before_the_first_stop(stops: list[str]) -> None:
    coder = tokenizer("bundled")
    text = "The dog watched the old rivers. The end is near."
    stream, said = Detokenizer(coder, stops), ""
    for token in coder.encode(text, add_special_tokens=False):
        said += stream.push(token)
        assert text.startswith(said)
        if stream.stopped:
            break
    said += stream.flush()
    places = [text.index(stop) for stop in stops if stop in text]
    assert said == (text[: min(places)] if places else text) and stream.stopped == bool(places)


def test_choice_follows_the_distribution_within_its_cuts() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf, 0.0]])
    settings = Sampling(temperature=0.7, top_p=0.93, top_k=3)
    likely = (logits[0].double() / 0.7).softmax(-1)
    allowed = [1, 2]  # the third is past 0.93
    assert likely[1] < 0.93 <= likely[1] + likely[2]
    draws = [(i + 0.5) / 4000 for i in range(4000)]
    chosen = choose(logits.expand(4000, -1).clone(), [settings] * 4000, draws)
    shares = torch.bincount(chosen, minlength=5) / 4000
    expected = torch.zeros(5, dtype=torch.float64)
    expected[allowed] = likely[allowed] / likely[allowed].sum()
    assert (shares - expected).abs().max() < 1e-3


def test_rows_choose_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50)
    settings = [Sampling(), Sampling(1.5, 0.9), Sampling(1e-6), Sampling(2.0, 1e-9)]
    draws = [0.1, 0.7, 0.99999999, 0.99999999]
    together = choose(logits, settings, draws)
    alone = [int(choose(logits[i : i + 1], settings[i : i + 1], draws[i : i + 1])) for i in range(4)]
    assert together.tolist() == alone
    assert together[[0, 2, 3]].tolist() == logits.argmax(-1)[[0, 2, 3]].tolist()
    assert Sampling(seed=5).source(0).random() != Sampling(seed=5).source(1).random()


@pytest.mark.parametrize("temperature", [1e-45, 1e-308, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf, -4.0], [-1.0, -3.0, -2.0, -torch.inf, -0.5]])
    assert choose(logits, [Sampling(temperature)] * 2, [0.999] * 2).tolist() == [1, 4]


async def _batches(*jobs: tuple[MethodConfig | None, int, int, Any]) -> list[list[int]]:
    queue = Scheduler(ServeSettings(window_ms=0, max_batch=4, max_batch_tokens=100))
    made = []
    for method, rows, length, session in jobs:
        prompts = [(1,) * length] * rows
        made.append(Job(prompts, (method and (method,)) or (), Sampling(), 10, 1.0, lambda: Detokenizer(None), session))
        queue.put(made[-1])
    queue.close()
    return [[made.index(job) for job in batch] for batch in iter(queue.take, [])]


def test_batches_hold_one_method_and_stay_within_bounds() -> None:
    snap, other = SnapKV(budget=40), SnapKV(budget=41)

    def batches(*jobs: tuple[Any, ...]) -> list[list[int]]:
        return asyncio.run(_batches(*((*job, None, None)[:4] for job in jobs)))

    assert batches((snap, 1, 10), (other, 1, 10), (None, 1, 10)) == [[0], [1], [2]]
    assert batches((snap, 2, 10), (other, 1, 10), (SnapKV(budget=40), 2, 10)) == [[0, 2], [1]]
    assert batches((snap, 3, 10), (snap, 2, 10), (snap, 1, 10)) == [[0, 2], [1]]
    assert batches((snap, 3, 2), (snap, 1, 13), (snap, 1, 3)) == [[0, 2], [1]]  # the nearest in length rides along
    assert batches((snap, 1, 60), (snap, 1, 10)) == [[0], [1]]
    assert batches((snap, 1, 500), (snap, 1, 10)) == [[0], [1]]
    assert batches((snap, 1, 10, ("", "a")), (snap, 1, 10), (snap, 1, 10, ("", "b"))) == [[0], [1], [2]]
