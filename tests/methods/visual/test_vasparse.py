"""VASparse in numbers: the optimum that its selection promises, worked examples, clusters, and refused options."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llm_accel import ConfigError, VASparse
from llm_accel.methods.visual.clusters import cluster_centres
from tests.vasparse_oracle import density_peaks


def split(into: torch.Tensor) -> tuple[list[int], list[int]]:
    """Entries of one head that stay, and those that go."""
    own = torch.arange(len(into))
    return own[into == own].tolist(), own[into != own].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_selection_is_the_optimum(seed: int) -> None:
    """Theorem 1, by trying every mask: ||qK - q(M K)||^2 - lam P M is least for the entries that stay."""
    generator = torch.Generator().manual_seed(seed)
    stored, count, lam = 4 + seed % 5, 3, 2.0
    products, saliency = torch.randn(1, 1, stored, generator=generator), torch.rand(1, 1, stored, generator=generator)
    method = VASparse(lam=lam, merge=None, protect_last=0)
    into = method.destinations(products, saliency, torch.zeros(1, 1, stored, 2), count)[0, 0]
    share = saliency[0, 0].softmax(0)

    def error(kept: tuple[int, ...]) -> float:
        gone = [i for i in range(stored) if i not in kept]
        return float(products[0, 0, gone].square().sum() - lam * share[list(kept)].sum())

    best = min(itertools.combinations(range(stored), count), key=error)
    assert split(into)[0] == sorted(best)
    assert set(into[into < 0].tolist()) <= {-1}


def test_worked_example_of_a_selection() -> None:
    """Two query heads share the keys: delta is their mean square, and P tips the scales; equals: the older one."""
    products = torch.tensor([[[3.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 2.0, 1.0, 0.0]]])
    saliency = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 9.0]]])
    method = VASparse(lam=0.0, protect_last=0, merge=None)
    assert method.importance(products, saliency)[0, 0].tolist() == [5.0, 1.0, 2.0, 1.0, 0.0]
    key = torch.zeros(1, 1, 5, 2)
    assert method.destinations(products, saliency, key, 3)[0, 0].tolist() == [0, 1, 2, -1, -1]
    looking = VASparse(lam=10.0, protect_last=0, merge=None)
    assert looking.destinations(products, saliency, key, 2)[0, 0].tolist() == [0, -1, -1, -1, 4]
    recent = VASparse(lam=0.0, protect_last=2, merge=None)
    assert recent.destinations(products, saliency, key, 3)[0, 0].tolist() == [0, -1, -1, 3, 4]
    # without a look at the image, P is the same for all and sums up to 1
    shares = VASparse(lam=1.0).importance(torch.zeros(1, 2, 5), torch.zeros(1, 1, 5))
    assert torch.allclose(shares, torch.full((1, 1, 5), 0.2))


def test_discarded_tokens_are_summed_by_cluster() -> None:
    """Entries 1 and 3 are alike, 4 and 5 too: each pair becomes one entry, that of its centre."""
    products = torch.tensor([[[9.0, 0.0, 8.0, 0.0, 0.0, 0.0, 7.0]]])
    key = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.1, 0.0], [5.0, 5.0], [5.0, 5.2], [0.0, 0.0]])[None, None]
    method = VASparse(merge=2, protect_last=0)
    into = method.destinations(products, torch.zeros(1, 1, 7), key, 3)[0, 0].tolist()
    assert into == [0, 3, 2, 3, 4, 4, 6]  # 3 and 4 lie nearer to the other pair
    alone = VASparse(merge=1, protect_last=0).destinations(products, torch.zeros(1, 1, 7), key, 3)
    assert alone[0, 0].tolist() == list(range(7))


@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_clusters_equal_their_definition(count: int) -> None:
    points = torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(count))
    points[0, 0, count // 2] = points[0, 0, 0]  # a tie
    for clusters in {1, (count + 2) // 3, count}:
        found = cluster_centres(points, clusters)
        for row, head in itertools.product(range(2), range(3)):
            wanted = torch.zeros(count, dtype=torch.long)
            for centre, members in density_peaks(points[row, head].double(), clusters).items():
                wanted[members] = centre
            assert torch.equal(found[row, head], wanted)


def test_worked_example_of_the_penalty() -> None:
    """An entry that draws all attention keeps its logit, one that draws none gets (1 + beta) of it, padding nothing."""
    logits, real = torch.tensor([[[2.0, -1.0, 5.0]]]), torch.tensor([[[True, True, False]]])
    received = torch.tensor([[[1000.0, 0.0, 5000.0]]])
    assert VASparse(beta=0.5).penalised(logits, received, real)[0, 0, :2].tolist() == [2.0, -1.5]
    even = VASparse(beta=0.5).penalised(logits, torch.zeros(1, 1, 3), real)[0, 0, :2]
    assert torch.allclose(even, torch.tensor([2.5, -1.25]))  # w = 1/2 each: 1.5 s - 0.25 s
    assert VASparse(beta=0.0).penalised(logits, received, real)[0, 0].tolist() == [2.0, -1.0, 5.0]


def test_worked_example_of_the_contrast() -> None:
    """Eq. 6, then tokens below a tenth of the likeliest are out; alpha = 0 leaves the distribution as it is."""
    scores, second = torch.tensor([[4.0, 3.0, 1.0]]), torch.tensor([[2.0, -2.0, -9.0]])
    mixed = VASparse(alpha=0.5, plausibility=0.1).contrasted(scores, second)[0]
    wanted = torch.tensor([1.5 * 4 - 0.5 * 2, 1.5 * 3 + 0.5 * 2]).log_softmax(0)  # exp(1 - 4) is below a tenth
    assert torch.allclose(mixed[:2], wanted) and mixed[2] == -math.inf
    every = VASparse(alpha=0.5, plausibility=0.0).contrasted(scores, second)[0]
    assert torch.allclose(every, torch.tensor([5.0, 5.5, 6.0]).log_softmax(0))
    assert torch.allclose(VASparse(alpha=0.0, plausibility=0.0).contrasted(scores, second), scores.log_softmax(-1))
    # the likeliest token always stays, and what was impossible stays so
    strict = VASparse(alpha=9.0, plausibility=1.0).contrasted(torch.tensor([[-math.inf, 0.5, 0.0]]), second)
    assert strict[0].tolist() == [-math.inf, 0.0, -math.inf]


def test_how_many_stay() -> None:
    method = VASparse(keep=0.9, prune_every=16, protect_last=4)
    assert [method.entries(20, generated) for generated in (15, 16, 17, 32)] == [20, 15, 20, 20]
    assert VASparse(keep=0.1, prune_every=2, protect_last=4).entries(10, 10) == 4
    assert VASparse(keep=0.5, prune_every=2, protect_last=0).entries(10, 10) == 5


def test_attention_to_the_image() -> None:
    weights = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]])
    visual = torch.tensor([[False, True, True]])
    assert VASparse().saliency(weights, visual).tolist() == pytest.approx([0.9])
    assert VASparse(saliency_head="mean").saliency(weights, visual).tolist() == pytest.approx([0.7])


def test_the_second_path_misses_a_share_of_the_image() -> None:
    positions = torch.arange(20_000)
    hidden = VASparse(mask_rate=0.3).unseen(positions)
    assert abs(float(hidden.float().mean()) - 0.3) < 0.02
    assert torch.equal(hidden, VASparse(mask_rate=0.3).unseen(positions))
    assert not torch.equal(hidden, VASparse(mask_rate=0.3, seed=1).unseen(positions))
    assert not VASparse(mask_rate=0.0).unseen(positions).any() and VASparse(mask_rate=1.0).unseen(positions).all()


def test_each_part_can_be_switched_off() -> None:
    off = VASparse(alpha=0.0, beta=0.0, keep=1.0)
    assert not (off.contrasts or off.penalises or off.prunes or off.attends)
    default = VASparse()
    assert default.contrasts and default.penalises and default.prunes and default.spec() == "vasparse"


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -0.1},
        {"beta": -1.0},
        {"lam": -1.0},
        {"keep": 0.0},
        {"keep": 1.2},
        {"mask_rate": 1.1},
        {"plausibility": -0.1},
        {"merge": 0},
        {"prune_every": 0},
        {"sink_window": 0},
        {"protect_last": -1},
    ],
)
def test_refused_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        VASparse(**options)
