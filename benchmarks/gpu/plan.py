"""The items of a run, in the order of what they decide."""

from __future__ import annotations

from typing import Any

from benchmarks.end_to_end import steps
from benchmarks.gpu import checks, faults, operations, yardsticks
from benchmarks.gpu.items import OUT, Item, bench_lines, junit_lines

SHAPE = ("-m", "llm_accel", "bench", "--no-plot", "--rounds", "1", "--shape", "llama-3.1-8b")
EIGHT = ("--set", "num_hidden_layers=8")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={OUT}/tests.xml", "--tb=short")
SMOKE = 15  # one in so many cases of the kernels' tests; all of those without parameters
WORKERS = 12


def first_items() -> list[Item]:
    """What ten minutes are for: is it right, is it fast where that was in doubt, do whole models gain."""
    graphs = "(snapkv or h2o) and auto_compiles or hip_has_a_graph or another_thread"
    kernels = (*PYTEST, "-n", str(WORKERS), "tests/kernels/triton_kernels", "--share", str(SMOKE))
    return [
        cases("yardsticks", yardsticks.NAMES, seconds=20, limit=45, case_limit=20, running=11),
        cases("checks", checks.NAMES, seconds=45, limit=90, case_limit=25),
        command("tests of kernels", kernels, seconds=35, limit=75, running=8, kernels_of_tests=True, workers=WORKERS),
        command(
            "tests of compiled decoding",
            (*PYTEST, "-n", "4", "tests/patches/test_compiled_gpu.py", "-k", graphs),
            seconds=50,
            limit=90,
            running=10,
            graphs=(1,) * 4,  # HiP has one for each pattern of its steps; the other processes have fewer
        ),
        cases("operations", operations.first_names(), seconds=95, limit=140, case_limit=30),
        command(
            "trace, 8 layers",
            ("-m", "benchmarks.trace", "--layers", "8", "--out", OUT),
            seconds=45,
            limit=90,
            running=15,
            methods=("snapkv",),
            graphs=(8,),
        ),
        command(
            "16k, SnapKV, compiled",
            (
                *(*SHAPE, "--lengths", "16k", "--new-tokens", "32", "--decode", "compiled", "--no-static"),
                *("--method", "snapkv:budget=2048", "--out", OUT),
            ),
            seconds=120,
            limit=150,
            running=35,
            methods=("dense", "snapkv"),
            graphs=(32, 32),
        ),
        command(
            "128k, HiP, 8 layers",
            (*SHAPE, *EIGHT, "--lengths", "128k", "--new-tokens", "16", "--method", "hip", "--out", OUT),
            seconds=45,
            limit=70,
            running=28,
            methods=("hip",),
        ),
        command(
            "32k, H2O, 8 layers",
            (*SHAPE, *EIGHT, "--lengths", "32k", "--new-tokens", "16", "--method", "h2o:budget=2048", "--out", OUT),
            seconds=40,
            limit=60,
            running=22,
            methods=("h2o",),
        ),
    ]


def later_items() -> list[Item]:
    """What there is time for in longer runs: every test, every operation, whole models with all layers."""
    every = tuple(operations.with_variants(operations.all_cases()))
    rest = tuple(name for name in every if name not in operations.first_names())
    tests = ("tests/kernels", "tests/patches/test_compiled_gpu.py")
    return [
        cases("more operations", rest, seconds=60, limit=600, case_limit=60),
        command("all tests of the GPU", (*PYTEST, "-n", str(WORKERS), *tests), seconds=90, limit=900),
        *(
            command(step.name, ("-m", step.module, *step.arguments, "--out", OUT), step.seconds, 2 * step.seconds)
            for step in steps()
        ),
    ]


def dry_items() -> list[Item]:
    """The same items in miniature, for a machine without a GPU."""
    small = ("-m", "llm_accel", "bench", "--no-plot", "--rounds", "1", "--shape", "small", "--new-tokens", "4")
    tiny = (*small, "--set", "num_hidden_layers=2", "--lengths", "128", "--out", OUT)
    trace = ("--layers", "2", "--shape", "small", "--length", "96", "--steps", "2", "--method", "snapkv:budget=64")
    return [
        cases("yardsticks", yardsticks.DRY_NAMES, seconds=1, limit=60, case_limit=20),
        cases("checks", checks.NAMES, seconds=1, limit=90, case_limit=25),
        command("tests of kernels", (*PYTEST, "--noconftest", "tests/kernels/test_dispatch.py"), seconds=1, limit=60),
        cases("operations", tuple(operations.cases("cpu")), seconds=1, limit=90, case_limit=30),
        command("trace", ("-m", "benchmarks.trace", *trace, "--device", "cpu", "--out", OUT), seconds=1, limit=60),
        command("whole models", (*tiny, "--method", "snapkv:budget=64", "--method", "hip"), seconds=1, limit=60),
    ]


def injected() -> Item:
    """Failures of every kind."""
    return cases("injected failures", faults.NAMES, seconds=1, limit=60, case_limit=2)


def cases(
    group: str, names: tuple[str, ...], seconds: float, limit: float, case_limit: float, running: float = 0.0
) -> Item:
    """An item of cases; those of one module may make several items."""
    modules = {"injected failures": "faults", "more operations": "operations"}
    return Item(
        group, seconds, limit, group=modules.get(group, group), cases=names, case_limit=case_limit, running=running
    )


def command(name: str, arguments: tuple[str, ...], seconds: float, limit: float, **more: Any) -> Item:
    """An item of one process; ``more`` says what it compiles and how long it runs."""
    lines = junit_lines if "pytest" in arguments else bench_lines
    return Item(name, seconds, limit, command=arguments, lines=lines, **more)
