"""Points of a grid, their batches and cost."""

from __future__ import annotations

from collections import Counter

import pytest

from llm_accel.eval.grid import GridPoint, Speed, batches, cost, duration, points


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_shards_are_disjoint_complete_and_even(count):
    lengths = (512, 1024, 2048)
    whole = points(lengths, (0.0, 25.0, 50.0, 100.0), 3)
    assert len(whole) == len(set(whole)) == 36
    shards = [whole[i::count] for i in range(count)]  # what the runner takes
    assert Counter(point for shard in shards for point in shard) == Counter(whole)
    for length in lengths:
        shares = [sum(point.length == length for point in shard) for shard in shards]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_batches_hold_what_is_alike_and_everything_once(size):
    wanted = points((512, 1024), (0.0, 50.0, 100.0), 3)
    rows = list(batches(reversed(wanted), size, lambda point: point.length))
    assert [point for row in rows for point in row] == wanted
    assert all(len({point.length for point in row}) == 1 and len(row) <= size for row in rows)


def test_cost_counts_what_is_left():
    pending = [
        (GridPoint(512, 0.0, 0), 512, 10, 2),
        (GridPoint(512, 0.0, 1), 512, 10, 1),
        (GridPoint(1024, 0.0, 0), 1024, 20, 1),
    ]
    said = cost(pending, Speed(0.01, 0.0, 0.1))
    assert said.startswith("2 cells, 4 prompts, 2,560 prompt tokens, at most 50 new tokens; about 31 s at")


def test_speed_fits_a_linear_and_a_square_part():
    truth = Speed(1e-4, 1e-7, 0.01)
    fitted = Speed.fit((512, truth.seconds(512, 0)), (2048, truth.seconds(2048, 0)), 0.01)
    assert fitted.seconds(8192, 5) == pytest.approx(truth.seconds(8192, 5))
    assert Speed.fit((512, 1.0), None, 0.0).seconds(1024, 0) == pytest.approx(2.0)
    assert Speed.fit((512, 1.0), (2048, 1.0), 0.0).seconds(8192, 0) >= 0  # noise must not give negative time


def test_durations():
    assert [duration(s) for s in (0.2, 59, 200, 7500)] == ["1 s", "59 s", "3 min 20 s", "2 h 5 min"]
