"""VHR's choice of heads, PAINT's tokens and weights, VAR's sinks, each against its formula in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_accel import PAINT, VAR, VHR, ConfigError
from llm_accel.methods import Columns, HeadScaling, WeightShift
from llm_accel.methods.visual.paint import LOCAL, SUMMARY
from llm_accel.methods.visual.var import SINK, VISUAL, prominence


@pytest.mark.parametrize(
    ("method", "layers", "acting"),
    [
        (VHR(), 32, (1, *range(18, 32))),
        (VHR(), 28, (1, *range(16, 28))),
        (VHR(layers=(3, 0)), 4, (0, 3)),
        (PAINT(), 32, tuple(range(2, 32))),
        (PAINT(), 2, (1,)),
        (VAR(), 32, tuple(range(2, 31))),
        (VAR(first_layer=0), 3, (0, 1)),
    ],
)
def test_acting_layers(method: HeadScaling | WeightShift, layers: int, acting: tuple[int, ...]) -> None:
    assert method.acting_layers(layers) == acting


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_factors_of_vhr(seed: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen, blind = (torch.randn(2, heads, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    blind[:, 0] *= 6  # a head that surges without the image
    factors = VHR(alpha=3.0).factors(seen, blind)
    for row in range(2):
        change = [math.dist(a, b) for a, b in zip(seen[row].tolist(), blind[row].tolist(), strict=True)]
        active = [sum(x * x for x in b) for b in blind[row].tolist()]
        kept = [
            0.0
            if c > statistics.mean(change) + statistics.stdev(change)
            and a > statistics.mean(active) + statistics.stdev(active)
            else c
            for c, a in zip(change, active, strict=True)
        ]
        assert factors[row].tolist() == [3.0 if c > statistics.median(kept) else 1.0 for c in kept]


def test_tokens_of_paint() -> None:
    first = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.8, 0.0, 0.05, 0.04])
    last = torch.tensor([0.10, 0.11, 0.12, 5.0, 0.13, 0.12, 0.11, 0.10])  # one outlier, which is local too
    there = torch.ones(8, dtype=torch.bool)
    marks = PAINT(local=0.25).tower_marks(first, last, there)
    assert marks.tolist() == [0, 0, 0, SUMMARY, LOCAL, 0, 0, 0]
    there[4] = False  # it has left the tower, and is no token any more
    assert PAINT(local=0.25).tower_marks(first, last, there).tolist() == [0, 0, 0, SUMMARY, 0, 0, 0, 0]
    assert PAINT(local=0.0).tower_marks(first, last, there).tolist() == [0, 0, 0, SUMMARY, 0, 0, 0, 0]
    assert PAINT().tower_marks(first, last, torch.zeros_like(there)).tolist() == [0] * 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(0, 3))
def test_shift_of_paint(seed: int, alpha: float, beta: float) -> None:
    """Row by row in float64, from logits that would overflow an exponential."""
    generator = torch.Generator().manual_seed(seed)
    logits = 40 * torch.randn(1, 2, 1, 6, generator=generator)
    rest = 40 * torch.randn(1, 2, 1, generator=generator)
    values, other = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 3, generator=generator)
    marks = torch.tensor([0, LOCAL, SUMMARY, LOCAL, SUMMARY, 0], dtype=torch.int8).expand(1, 2, 1, 6)
    total = torch.logaddexp(logits.logsumexp(-1), rest)
    factor, weights = PAINT(alpha=alpha, beta=beta).shift(Columns(logits, total, marks))
    for head in range(2):
        line = torch.cat([logits[0, head, 0], rest[0, head]]).double()
        strength = [0.0, alpha, beta, alpha, beta, 0.0, 0.0]
        raised = torch.stack([z + w * abs(z) for z, w in zip(line, strength, strict=True)])
        mixed = torch.cat([values[head], other[head : head + 1]]).double()
        before, wanted = line.softmax(0) @ mixed, raised.softmax(0) @ mixed
        got = float(factor[0, head, 0]) * before + weights[0, head, 0].double() @ values[head].double()
        assert torch.allclose(got, wanted, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.6))
def test_shift_of_var(seed: int, remove: float, rho: float, least: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, 3, 2, 6, generator=generator)
    marks = torch.tensor([SINK, VISUAL, VISUAL | SINK, VISUAL, 0, VISUAL], dtype=torch.int8).expand(1, 3, 1, 6)
    total = torch.logaddexp(logits.logsumexp(-1), torch.zeros(()))
    factor, added = VAR(remove=remove, rho=rho, least=least, dims=(0,)).shift(Columns(logits, total, marks))
    assert bool((factor == 1).all())
    weights = (logits.double() - total.double()[..., None]).exp()
    for head in range(3):
        for row in range(2):
            a = weights[0, head, row].tolist()
            image, useful, lost = a[1] + a[2] + a[3] + a[5], a[1] + a[3] + a[5], a[0] + a[2]
            active = image >= least and useful >= rho * image
            new = list(a)
            for column in (1, 3, 5) if active else ():
                new[column] += remove * lost * a[column] / useful
            for column in (0, 2) if active else ():
                new[column] *= 1 - remove
            assert added[0, head, row].tolist() == pytest.approx([n - o for n, o in zip(new, a, strict=True)], abs=1e-5)
            assert abs(float(added[0, head, row].sum())) < 1e-5


def test_a_visual_sink_must_be_seen() -> None:
    logits = torch.zeros(1, 1, 1, 3)
    for marks, moved in (((SINK, VISUAL, VISUAL), False), ((SINK, VISUAL, VISUAL | SINK), True)):
        columns = Columns(logits, logits.logsumexp(-1), torch.tensor(marks, dtype=torch.int8).view(1, 1, 1, 3))
        added = VAR(least=0.0, dims=(0,)).shift(columns)[1]
        assert bool(added.any()) is moved
    unseen = Columns(torch.tensor([[[[0.0, 0.0, -torch.inf]]]]), torch.full((1, 1, 1), math.log(2)), columns.marks)
    assert not VAR(least=0.0, dims=(0,)).shift(unseen)[1].any()


def test_marks_and_dimensions_of_var() -> None:
    hidden = torch.ones(1, 3, 500)
    hidden[0, 1, 7] = 900.0
    hidden[0, 2, 9] = 900.0
    assert float(prominence(hidden)[0, 1, 7]) == pytest.approx(900 / (1 / 500 * (899 * 901) + 1) ** 0.5, rel=1e-2)
    visual = torch.tensor([[False, True, True]])
    assert VAR(dims=(7,)).marks(visual, None, hidden).tolist() == [[0, VISUAL | SINK, VISUAL]]
    states = [hidden[:, 1:2]] * 8
    assert VAR().told(states, 8).dims == (7,)
    assert VAR(tau=1e4).told(states, 8).dims == ()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VHR, {"layers": ()}),
        (VHR, {"layers": (-1,)}),
        (VAR, {"dims": (-2,)}),
        (PAINT, {"local": 1.5}),
        (VAR, {"rho": 2}),
    ],
)
def test_impossible_options(kind: type, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="is not allowed; give"):
        kind(**options)
