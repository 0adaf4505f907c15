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


async def _taken(*jobs: tuple[MethodConfig, int, Any], most: int, tokens: int = 100) -> list[list[tuple[int, int]]]:
    """Job and number of the rows that are read together, for jobs of one method, so many rows and a session."""
    queue, made = Scheduler(ServeSettings()), []
    for number, (method, rows, session) in enumerate(jobs):
        prompts = [(number, row) * 5 for row in range(rows)]
        made.append(Job(prompts, (method,), Sampling(), 10, lambda: Detokenizer(None), session))
        queue.put(made[-1])
    queue.close()
    turns = []
    while (head := queue.head()) is not None:
        rows = queue.take(head, most, lambda taken: sum(len(row.prompt) for row in taken) <= tokens)
        turns.append([(made.index(row.job), row.index) for row in rows])
    return turns


def test_rows_that_are_read_together_have_one_method_and_fit() -> None:
    snap, other = SnapKV(budget=40), SnapKV(budget=41)

    def taken(*jobs: tuple[Any, ...], **bounds: int) -> list[list[tuple[int, int]]]:
        return asyncio.run(_taken(*((*job, None)[:3] for job in jobs), **bounds))

    assert taken((snap, 1), (other, 1), (SnapKV(budget=40), 2), most=4) == [[(0, 0), (2, 0), (2, 1)], [(1, 0)]]
    assert taken((snap, 3), (snap, 1), most=4, tokens=20) == [[(0, 0), (0, 1)], [(1, 0), (0, 2)]]
    assert taken((snap, 5), (other, 1), most=2) == [[(0, 0), (0, 1)], [(1, 0)], [(0, 2), (0, 3)], [(0, 4)]]
    assert taken((snap, 1, ("", "a")), (snap, 1), (snap, 1, ("", "b")), most=4) == [[(0, 0)], [(1, 0)], [(2, 0)]]


def test_who_wants_more_goes_behind_those_that_came_meanwhile() -> None:
    async def turns() -> list[int]:
        queue = Scheduler(ServeSettings())
        jobs = [Job([(1,)] * 3, (), Sampling(), 1, lambda: Detokenizer(None)) for _ in range(2)]
        order = []
        for job in jobs:
            queue.put(job)
            head = queue.head()
            assert head is not None
            order.append(jobs.index(head))
            queue.take(head, 1, lambda taken: True)
        while (head := queue.head()) is not None:
            order.append(jobs.index(head))
            queue.take(head, 1, lambda taken: True)
        return order

    assert asyncio.run(turns()) == [0, 1, 0, 1, 0, 1]


def test_a_session_that_is_busy_waits_and_holds_nobody_up() -> None:
    async def turns() -> list[str]:
        queue = Scheduler(ServeSettings())
        for session in (("", "a"), ("", "b"), None):
            queue.put(Job([(1,)], (), Sampling(), 1, lambda: Detokenizer(None), session))
        heads = (queue.head(busy) for busy in ((), {("", "a")}, {("", "a"), ("", "b")}))
        return [str(head and head.session) for head in heads]

    assert asyncio.run(turns()) == ["('', 'a')", "('', 'b')", "None"]
