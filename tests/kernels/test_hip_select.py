"""HiP selection against searches written out key by key in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_accel.kernels.block_sparse import block_sparse_attention
from llm_accel.kernels.hip_select import (
    ABSENT,
    ExactSearch,
    Keys,
    Scope,
    Search,
    Stage,
    StageSearch,
    TreeSearch,
    candidates,
    hip_select,
    reference,
)


@dataclass
class Case:
    """One problem with random inputs."""

    queries: int = 100
    slots: int = 300
    query_heads: int = 4
    heads: int = 2
    dim: int = 8
    padding: tuple[int, ...] | None = None
    batch: int = 1
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.queries)
        self.batch = self.batch if self.padding is None else len(self.padding)
        self.query = torch.randn(self.batch, self.query_heads, self.queries, self.dim, generator=generator)
        self.key = torch.randn(self.batch, self.heads, self.slots, self.dim, generator=generator)
        self.value = torch.randn(self.batch, self.heads, self.slots, self.dim, generator=generator)

    @property
    def start(self) -> Tensor | None:
        return None if self.padding is None else torch.tensor(self.padding)

    def row(self, index: int) -> Case:
        """One row alone, without its padding."""
        first = 0 if self.padding is None else self.padding[index]
        queries = min(self.queries, self.slots - first)
        alone = replace(self, queries=queries, slots=self.slots - first, padding=None, batch=1)
        alone.query = self.query[index : index + 1, :, self.queries - queries :]
        alone.key, alone.value = (part[index : index + 1, :, first:] for part in (self.key, self.value))
        return alone


SCOPE = Scope(sink=8, window=20, block_q=16, block_k=4)
STAGES = (Stage(16, None, 4), Stage(8, 128, 2), Stage(4, 64, 1))
SEARCHES: dict[str, Search] = {
    "stages": StageSearch(SCOPE, 32, STAGES),
    "stages_bisected": StageSearch(SCOPE, 32, STAGES, last_exact=False),
    "stages_all_heads": StageSearch(SCOPE, 32, STAGES, share_heads="all"),
    "tree": TreeSearch(SCOPE, budget=32),
    "tree_all_heads": TreeSearch(SCOPE, budget=32, stride=4, share_heads="all"),
    "exact": ExactSearch(SCOPE, budget=32),
    "exact_all_heads": ExactSearch(SCOPE, budget=32, share_heads="all"),
    "stages_raw": StageSearch(SCOPE, 32, STAGES, fair=False),
    "tree_raw": TreeSearch(SCOPE, budget=32, fair=False),
    "exact_raw": ExactSearch(SCOPE, budget=32, fair=False),
    "exact_scaled": ExactSearch(SCOPE, budget=32, scaling=1.5),
}
CASES = {
    "prefill": Case(slots=200, queries=200),
    "chunk": Case(),
    "odd": Case(queries=77, slots=263, query_heads=6, heads=3, dim=10),
    "decode": Case(queries=1, slots=250),
    "few": Case(queries=5, slots=251),
    "shorter_than_the_window": Case(queries=20, slots=20),
    "one_block_of_candidates": Case(queries=1, slots=32),
}
every_search = pytest.mark.parametrize("name", SEARCHES)


class Oracle:
    """One query block of one row, in loops."""

    def __init__(self, case: Case, search: Search, block: int) -> None:
        self.search, self.key = search, case.key[0].double()
        scope, first = search.scope, block * search.scope.block_q
        rows = [min(first + i, case.queries - 1) for i in range(scope.block_q)]
        self.rows = case.query[0][:, rows].double()  # [Hq, block_q, D]
        position = case.slots - case.queries + first
        self.end = max(scope.sink, (position - scope.window + 1) // scope.block_k * scope.block_k)
        self.group = case.query_heads // case.heads

    def score(self, reps: Tensor, head: int, positions: list[int]) -> float:
        """The best product of the group's representatives, [Hq, R, D], with keys of one head, each less its level."""
        queries = reps[head * self.group : (head + 1) * self.group].flatten(0, 1)
        products = queries @ self.key[head, positions].T
        return float((products.amax(-1) - self.levels(queries, head)).max())

    def levels(self, queries: Tensor, head: int) -> Tensor:
        """The log-sum-exp of each query's attention, [R, D] -> [R], over the scale: of the first 8 keys, and of 64
        evenly spaced ones behind them that stand for all up to the end of the candidates."""
        if not self.search.fair:
            return torch.zeros(len(queries)).double()
        scale = queries.shape[1] ** -0.5 if self.search.scaling is None else self.search.scaling
        beyond = max(1, self.end - 8)
        places = [(place, 1.0) for place in range(8)] + [(8 + i * beyond // 64, beyond / 64) for i in range(64)]
        seen = [(place, weight) for place, weight in places if place < max(self.end, 1)]
        products = queries @ self.key[head, [place for place, _ in seen]].T
        weights = torch.tensor([weight for _, weight in seen], dtype=torch.float64)
        return (scale * products + weights.log()).logsumexp(-1) / scale

    def means(self, stride: int) -> Tensor:
        return self.rows.unflatten(1, (-1, stride)).mean(2)

    def keep(self, table: list[dict[int, float]], count: int) -> list[list[int]]:
        """The ``count`` best starts of each head, score -> then lower start."""
        if getattr(self.search, "share_heads", "group") == "all":
            table = [{start: max(part[start] for part in table) for start in table[0]} for _ in table]
        return [sorted(sorted(part, key=lambda start: (-part[start], start))[:count]) for part in table]

    def chosen(self) -> list[list[int]]:
        """Chosen block starts of each KV head."""
        search = self.search
        if isinstance(search, StageSearch):
            return self._stages(search)
        return self._tree(search) if isinstance(search, TreeSearch) else self._exact(search)

    def _heads(self) -> range:
        return range(len(self.key))

    def _stages(self, search: StageSearch) -> list[list[int]]:
        sink = search.scope.sink
        starts = [list(range(sink, self.end, search.stages[0].chunk)) for _ in self._heads()]
        for index, stage in enumerate(search.stages):
            last = index + 1 == len(search.stages)
            tokens = search.budget if last else search.stages[index + 1].tokens
            if index:
                cut = range(0, search.stages[index - 1].chunk, stage.chunk)
                starts = [[s + c for s in part for c in cut if s + c < self.end] for part in starts]
            reps, table = self.means(stage.stride), []
            for head in self._heads():
                if last and search.last_exact:
                    table.append({s: self.score(reps, head, list(range(s, s + stage.chunk))) for s in starts[head]})
                else:
                    table.append({s: self._bisect(reps, head, s, stage.chunk) for s in starts[head]})
            starts = self.keep(table, tokens // stage.chunk)
        return starts

    def _bisect(self, reps: Tensor, head: int, start: int, chunk: int) -> float:
        low, high, found = start, min(start + chunk, self.end), float("-inf")
        for _ in range(chunk.bit_length()):
            middle = (low + high) // 2
            left, right = (self.score(reps, head, [(a + b) // 2]) for a, b in ((low, middle), (middle, high)))
            low, high = (low, middle) if left >= right else (middle, high)
            found = max(found, left, right)
        return found

    def _tree(self, search: TreeSearch) -> list[list[int]]:
        width, groups = search.scope.block_k, search.budget // search.scope.block_k
        blocks = (self.end - search.scope.sink) // width
        reps = self.rows[:, search.stride - 1 :: search.stride]
        edges = [g * blocks // groups for g in range(groups + 1)]
        found = [{a: b - a for a, b in pairwise(edges) if b > a} for _ in self._heads()]
        while any(size > 1 for part in found for size in part.values()):
            halves = []
            for part in found:
                cut = {}
                for begin, size in part.items():
                    left = (size + 1) // 2
                    cut |= {begin: left} | ({begin + left: size - left} if size > left else {})
                halves.append(cut)
            table = []
            for head in self._heads():
                scores = {}
                for begin, size in halves[head].items():
                    first = search.scope.sink + (begin + size // 2) * width
                    scores[begin] = self.score(reps, head, list(range(first, first + width)))
                table.append(scores)
            best = self.keep(table, groups)
            found = [{begin: halves[head][begin] for begin in best[head]} for head in self._heads()]
        return [[search.scope.sink + begin * width for begin in sorted(part)] for part in found]

    def _exact(self, search: ExactSearch) -> list[list[int]]:
        width = search.scope.block_k
        table = [
            {
                s: self.score(self.rows, head, list(range(s, s + width)))
                for s in range(search.scope.sink, self.end, width)
            }
            for head in self._heads()
        ]
        return self.keep(table, search.budget // width)


def chosen_by(search: Search, case: Case) -> list[list[list[int]]]:
    """[n][H] lists of starts, of the only row."""
    starts = search.select(case.query, case.key, case.start)[0]
    return [[[s for s in head if s < ABSENT] for head in block] for block in starts.transpose(0, 1).tolist()]


@every_search
@pytest.mark.parametrize("case", CASES)
def test_every_query_block_chooses_what_the_oracle_chooses(name: str, case: str) -> None:
    problem, search = CASES[case], SEARCHES[name]
    ours = chosen_by(search, problem)
    assert len(ours) == search.scope.blocks(problem.queries)
    for block, found in enumerate(ours):
        assert found == Oracle(problem, search, block).chosen(), block


@every_search
def test_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["prefill"]
    whole = SEARCHES[name].select(problem.query, problem.key, None)
    monkeypatch.setattr(candidates, "TILE", 1)
    assert torch.equal(SEARCHES[name].select(problem.query, problem.key, None), whole)


@every_search
@pytest.mark.parametrize("queries", [300, 120, 1])
def test_padded_rows_choose_what_they_choose_alone(name: str, queries: int) -> None:
    together, search = Case(queries=queries, padding=(0, 130, 290)), SEARCHES[name]
    starts = search.select(together.query, together.key, together.start)
    for index in range(3):
        alone = chosen_by(search, together.row(index))
        ours = [[[s for s in head if s < ABSENT] for head in block] for block in starts[index].transpose(0, 1).tolist()]
        assert ours[: len(alone)] == alone


@every_search
def test_equal_scores_go_to_the_lower_position(name: str) -> None:
    problem, search = CASES["decode"], SEARCHES[name]
    starts = search.select(problem.query, torch.ones_like(problem.key), None)
    first = [8, 12, 16, 20, 24, 28, 32, 36]
    if not isinstance(search, TreeSearch):  # a tree spreads over all groups before it chooses
        assert starts[0].tolist() == [[first]] * 2
    assert torch.equal(starts, search.select(problem.query, torch.ones_like(problem.key), None))


WIDE: dict[str, dict[str, Any]] = {
    "prefill": {"queries": 1000, "slots": 1000, "dim": 64},
    "chunk": {"queries": 333, "slots": 777, "dim": 80, "query_heads": 3, "heads": 1},
    "decode": {"queries": 1, "slots": 1500, "dim": 128, "query_heads": 8, "heads": 1},
    "batch": {"queries": 513, "slots": 513, "dim": 96, "batch": 2},
    "odd": {"queries": 65, "slots": 65, "dim": 64},
    "padded": {"queries": 300, "slots": 600, "padding": (0, 17, 400)},
}


@pytest.mark.parametrize("name", ["stages", "tree", "exact"])
@pytest.mark.parametrize("sink", [0, 256])
@pytest.mark.parametrize("shape", WIDE)
def test_a_budget_for_everything_is_dense_attention(shape: str, name: str, sink: int) -> None:
    problem, scope = Case(**WIDE[shape]), Scope(sink, 40, 64, 8)
    searches: dict[str, Search] = {
        "stages": StageSearch(scope, 1600, (Stage(256, None, 4), Stage(32, 2048, 4), Stage(8, 1600, 1))),
        "tree": TreeSearch(scope, 1600),
        "exact": ExactSearch(scope, 1600),
    }
    blocks = hip_select(problem.query, problem.key, searches[name], problem.start)
    for row in range(problem.batch):
        alone = problem.row(row)
        dense = torch.nn.functional.scaled_dot_product_attention(
            alone.query,
            alone.key,
            alone.value,
            attn_mask=torch.ones(alone.queries, alone.slots, dtype=torch.bool).tril(alone.slots - alone.queries),
            enable_gqa=True,
        )
        ours, _ = block_sparse_attention(
            problem.query, problem.key, problem.value, blocks, scaling=problem.dim**-0.5, start=problem.start
        )
        assert (ours[row, -alone.queries :].transpose(0, 1) - dense[0]).abs().max() <= 1e-5


def test_half_precision_is_scored_in_fp32() -> None:
    problem, search = CASES["prefill"], SEARCHES["exact"]
    query, key = problem.query.bfloat16(), problem.key.bfloat16()
    assert torch.equal(search.select(query, key, None), search.select(query.float(), key.float(), None))


@pytest.mark.parametrize("search", [SEARCHES[name] for name in ("exact", "exact_all_heads")])
def test_a_loud_head_does_not_choose_for_a_quiet_one(search: Search) -> None:
    """One head of a group has large products with all keys and looks at nothing in particular; the other looks for one
    key."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 300, 32, generator=generator)
    query = torch.randn(1, 2, 16, 32, generator=generator)
    key[..., 0], query[:, 0, :, 0], query[:, 1] = 1.0, 300.0, 0.0
    needle = 162  # no key that a level is taken from
    query[:, 1, :, 1:] = 2 * key[:, 0, needle, 1:]
    fair = [s for s in search.select(query, key, None)[0, 0, -1].tolist() if s < ABSENT]
    assert any(s <= needle < s + search.scope.block_k for s in fair)
    raw = replace(search, fair=False).select(query, key, None)[0, 0, -1].tolist()
    assert not any(s <= needle < s + search.scope.block_k for s in raw)


@pytest.mark.parametrize("room", ["slots", "heads", "fused"])
def test_keys_in_a_buffer_with_room_are_read_in_place(room: str) -> None:
    """A cache that has grown is a view of its buffer; only where heads lie between slots, keys are copied."""
    buffer = torch.randn(2, 4, 50, 16) if room != "fused" else torch.randn(2, 50, 4, 16).transpose(1, 2)
    key = buffer[:, :, 3:40] if room == "slots" else buffer[:, 1:3] if room == "heads" else buffer
    copied, view = Keys.of(key.contiguous(), None), Keys.of(key, None)
    assert (view.rows.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()) == (room != "fused")
    positions = torch.randint(0, 60, (*key.shape[:2], 3, 7))  # some of them after the last key
    assert torch.equal(view.rows[view.at(positions)], copied.rows[copied.at(positions)])
    lengths = torch.tensor([5, 30])
    ours, theirs = (Keys.first(given, lengths) for given in (key, key.contiguous()))
    assert torch.equal(ours.rows[ours.at(positions)], theirs.rows[theirs.at(positions)])


@every_search
def test_a_view_is_searched_like_a_copy(name: str) -> None:
    query, buffer = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 700, 16)
    key, search = buffer[:, :, :600], SEARCHES[name]
    assert torch.equal(search.select(query, key, None), search.select(query, key.contiguous(), None))


def test_scores_are_fp32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        key = torch.randn(1, 1, 64, 16)
        reps, starts = torch.randn(1, 1, 1, 4, 16).float(), torch.arange(0, 64, 8)[None, None, None]
        end = torch.full((1, 1, 1, 1), 64)
        for exact in (False, True):
            assert reference.score(reps, Keys.of(key, None), starts, end, 8, exact).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
