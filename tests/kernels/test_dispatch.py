"""Choice of a backend: order, limits, LLM_ACCEL_BACKEND, and one node under torch.compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.kernels import dispatch
from llm_accel.kernels.dispatch import Backend, Op, Problem, all_ops, torch_backend, why_not_triton
from llm_accel.kernels.launch import Launch, ceil_div, next_power_of_2, operation, strides, unit_stride

CPU = Problem(torch.device("cpu"), torch.float32, head_dim=64, group=4)


def narrow(problem: Problem) -> str | None:
    return None if problem.head_dim <= 64 else f"{problem.head_dim} channels are too many"


SAMPLE = Op("sample", Backend("fast", lambda: "fast", narrow, "a kernel"), torch_backend(lambda: "slow", "row by row"))


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without requests; tests set their own."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._requests.cache_clear()
    yield monkeypatch
    dispatch._requests.cache_clear()


def test_the_first_backend_that_supports_the_problem(requests: pytest.MonkeyPatch) -> None:
    assert SAMPLE.choose(CPU).run() == "fast"
    assert SAMPLE.explain(CPU) == ("fast", "a kernel")
    wide = Problem(CPU.device, CPU.dtype, head_dim=80)
    assert SAMPLE.choose(wide).run() == "slow"
    assert SAMPLE.explain(wide) == ("torch", "plain-torch reference, row by row; no fast: 80 channels are too many")


def test_every_package_of_kernels_declares_its_operation() -> None:
    assert {"column_votes", "pair_probabilities", "ragged_attention"} <= set(all_ops())
    for op in all_ops().values():
        assert op.backends[-1].name == "torch"
        assert op.backends[-1].why_not(CPU) is None


def test_a_request_is_followed(requests: pytest.MonkeyPatch) -> None:
    requests.setattr(dispatch, "all_ops", lambda: {"sample": SAMPLE})
    requests.setenv(dispatch.VARIABLE, " sample = torch ,")
    assert SAMPLE.choose(CPU).run() == "slow"
    assert SAMPLE.explain(CPU)[1].endswith("asked for by LLM_ACCEL_BACKEND")


def test_a_request_that_cannot_be_met_is_an_error(requests: pytest.MonkeyPatch) -> None:
    requests.setattr(dispatch, "all_ops", lambda: {"sample": SAMPLE})
    requests.setenv(dispatch.VARIABLE, "sample=fast")
    assert SAMPLE.choose(CPU).run() == "fast"
    with pytest.raises(ConfigError, match=r"asks for sample=fast.*128 channels are too many.*fast, torch"):
        SAMPLE.choose(Problem(CPU.device, CPU.dtype, head_dim=128))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("column_votes", r"'column_votes' is not of the form operation=backend"),
        ("column_vote=torch", r"unknown operation 'column_vote'. Did you mean 'column_votes'\?"),
        ("pair_probabilities=cuda", r"unknown backend of pair_probabilities 'cuda'.*Allowed: torch"),
        ("column_votes=torch,column_votes=torch", r"names column_votes twice"),
    ],
)
def test_unknown_names_are_errors(requests: pytest.MonkeyPatch, text: str, message: str) -> None:
    requests.setenv(dispatch.VARIABLE, text)
    with pytest.raises(ConfigError, match=message):
        SAMPLE.choose(CPU)


def test_the_environment_is_read_once(requests: pytest.MonkeyPatch) -> None:
    assert SAMPLE.choose(CPU).name == "fast"
    requests.setenv(dispatch.VARIABLE, "nonsense")
    assert SAMPLE.choose(CPU).name == "fast"


def test_limits_of_triton_kernels(requests: pytest.MonkeyPatch) -> None:
    requests.setattr(dispatch, "why_no_triton", lambda device: None)
    assert why_not_triton(CPU) is None
    assert "not torch.float64" in str(why_not_triton(Problem(CPU.device, torch.float64, 64)))
    assert "not 320" in str(why_not_triton(Problem(CPU.device, torch.bfloat16, 320)))


def test_nothing_but_nvidia_gpus() -> None:
    assert "not for xpu" in str(dispatch.why_no_triton(torch.device("xpu")))


def test_importing_operations_imports_no_kernel_and_starts_no_cuda() -> None:
    code = "import sys, torch, llm_accel; from llm_accel.kernels.dispatch import all_ops; all_ops()"
    check = "assert not [name for name in sys.modules if 'llm_accel' in name and 'triton' in name]"
    check += "; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)


def _doubled_fake(values: Tensor, extra: Tensor | None, times: int, kind: str, to: torch.dtype | None) -> Tensor:
    return torch.empty_like(values, dtype=to)


def _doubled_plan(
    values: Tensor, extra: Tensor | None, times: int, kind: str, to: torch.dtype | None
) -> tuple[Tensor, list[Launch]]:
    result = torch.from_numpy(values.detach().numpy() * 2)  # what Dynamo could not keep in one graph of tensors
    return (result * times if extra is None else result + extra).to(to or values.dtype), []


doubled = operation("doubled", _doubled_plan, _doubled_fake)


def test_an_operation_is_one_node() -> None:
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    values = torch.arange(6.0).view(2, 3)
    compiled = torch.compile(lambda x: doubled(x, None, 3, "sum", None) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(values), values * 6 + 1)
    assert sum("llm_accel" in node for node in nodes) == 1
    with torch.inference_mode():
        assert torch.equal(doubled(values, values, 1, "sum", torch.float64), values.double() * 3)
    torch.library.opcheck(doubled, (values, None, 2, "sum", None))


def test_a_launch_of_nothing_is_none() -> None:
    Launch(None, (3, 0), {}, {}, 4, 2).run()


def test_small_helpers() -> None:
    assert [ceil_div(count, 4) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(count) for count in (1, 2, 3, 80, 128)] == [1, 2, 4, 128, 128]
    assert next_power_of_2(3, least=16) == 16
    tensor = torch.empty(2, 3, 5)
    assert strides("q", tensor, "bh") == {"q_b": 15, "q_h": 5}
    assert unit_stride(tensor) is tensor
    assert unit_stride(tensor.transpose(1, 2)).stride(-1) == 1
