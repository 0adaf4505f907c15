"""Linear layers by oneDNN: right, only where they can be, and only where they are faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm_accel.common import cpu_linear
from llm_accel.common.cpu_linear import OneDnnLinear, use_faster_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


class Own(nn.Linear):
    """A layer with a reason to be its own class."""


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 77), (0,)])
@torch.no_grad()
def test_large_layers_give_the_same_product(faster: None, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(320, 448, bias=bias)
    rows = torch.randn(*shape, 320)
    exact = torch.nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert use_faster_linear(layer) == 1 and type(layer) is OneDnnLinear
    assert layer(rows).dtype == torch.float32
    torch.testing.assert_close(layer(rows).double(), exact, rtol=1e-5, atol=1e-5)
    strided = torch.cat([rows, rows], -1)[..., :320]
    torch.testing.assert_close(layer(strided), layer(rows))


def test_other_layers_stay(faster: None) -> None:
    model = nn.ModuleList([Own(512, 512), nn.Linear(512, 512, dtype=torch.bfloat16), nn.Embedding(512, 512)])
    kinds = [type(layer) for layer in model]
    assert use_faster_linear(model) == 0
    assert [type(layer) for layer in model] == kinds


@torch.no_grad()
@pytest.mark.parametrize(
    ("width", "rows", "expected"),
    [(128, 16, 0), (128, 512, 1), (512, 1, 1)],
    ids=["small", "many rows", "many weights"],
)
def test_small_products_are_left_to_blas(
    faster: None, width: int, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, calls, product = nn.Linear(width, width), list[Any](), cpu_linear.product
    monkeypatch.setattr(cpu_linear, "product", lambda *given: calls.append(given) or product(*given))
    use_faster_linear(layer)
    layer(torch.randn(rows, width))
    assert len(calls) == expected


def test_nothing_changes_where_onednn_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: False)
    layer = nn.Linear(512, 512)
    assert use_faster_linear(layer) == 0 and type(layer) is nn.Linear


def test_the_trial_compares_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, expected in (((2.0, 1.0), True), ((1.1, 1.0), False), ((1.0, 2.0), False)):
        taken = iter(times)
        monkeypatch.setattr(cpu_linear, "_seconds", lambda work, taken=taken: next(taken))
        assert cpu_linear.onednn_is_faster.__wrapped__() is expected


@torch.no_grad()
def test_a_compiler_sees_a_plain_layer(faster: None) -> None:
    layer, rows, seen = nn.Linear(320, 448), torch.randn(2, 1, 320), list[str]()

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    use_faster_linear(layer)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(rows), layer(rows))
    assert len(seen) == 1 and "linear" in seen[0] and "mkldnn" not in seen[0]


@torch.no_grad()
def test_products_of_many_lengths_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, one = set[int](), cpu_linear._product
    monkeypatch.setattr(cpu_linear, "_product", lambda rows, *rest: sizes.add(len(rows)) or one(rows, *rest))
    weight, bias = torch.randn(8, 16), torch.randn(8)
    for length in range(2000):
        rows = torch.randn(length, 16)
        torch.testing.assert_close(cpu_linear.product(rows, weight, bias), rows @ weight.T + bias, rtol=1e-4, atol=1e-5)
    assert len(sizes) < 40 and max(sizes) == 256
