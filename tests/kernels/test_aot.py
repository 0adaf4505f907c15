"""The ahead-of-time check: what is planned is what is compiled, and what is unfit is said."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llm_accel.kernels.dispatch import all_ops, interpreting
from llm_accel.kernels.launch import SHARED_MEMORY
from tests.kernels import aot, compiled
from tests.kernels.aot import Usage

pytestmark = pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")


def test_every_operation_with_a_triton_backend_ships_configurations() -> None:
    written = {name for name, op in all_ops().items() if op.backends[0].name == "triton"}
    assert {op for op, _ in aot.compiled()} == written


def test_plans_allocate_nothing() -> None:
    for launches in aot.compiled().values():
        given = [value for launch in launches for value in launch.arguments.values()]
        assert {value.device.type for value in given if isinstance(value, torch.Tensor)} == {"meta"}


def test_arguments_are_specialised_as_at_a_launch() -> None:
    (launch,) = aot.compiled()["gather_entries", "128 16-bit"]
    signature, constants, attributes = aot._source(launch)
    names = [parameter.name for parameter in launch.kernel.params]
    assert signature["indices"] == "*i64" and signature["keys"] == "*i16"
    assert constants["scores"] is None and constants["D"] == 128
    assert signature["count"] == "i32" and (names.index("count"),) not in attributes
    assert attributes[names.index("k_s"),] == attributes[names.index("keys"),] == [["tt.divisibility", 16]]


def test_equal_code_has_one_fingerprint() -> None:
    plans = aot.compiled()
    scored, plain = plans["gather_entries", "128 16-bit with scores"], plans["gather_entries", "128 16-bit"]
    assert aot.fingerprint(plain[0]) == aot.fingerprint(aot.compiled()["gather_entries", "128 16-bit"][0])
    assert aot.fingerprint(scored[0]) != aot.fingerprint(plain[0])


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_a_kernel_compiles_without_a_gpu(arch: int) -> None:
    usage = aot.compile_for(aot.compiled()["gather_entries", "128 16-bit"][0], arch)
    assert 16 <= usage.registers <= 255
    assert usage.complaint(arch) is None


def test_tiles_in_shared_memory_are_counted() -> None:
    launch = aot.compiled()["ragged_attention", "decode 64 bf16"][0]
    usage = aot.compile_for(launch, 90)
    assert usage.buffers >= 2 and usage.products == "mma" and usage.complaint(90) is None
    shallow = aot.compile_for(replace(launch, stages=2), 90)
    assert shallow.buffers == 1  # what the check is there to find
    assert replace(shallow, wanted=2).complaint(90) == "1 tiles in shared memory at once, 2 are wanted"


def test_hopper_multiplies_as_it_is_wanted_to() -> None:
    launch = aot.compiled()["hip_select", "bfloat16 head_dim 128 chunk 8 queries 256"][0]
    usage = aot.compile_for(launch, 90)
    assert usage.products == "wgmma" and usage.buffers >= 2 and usage.complaint(90) is None
    narrow = replace(launch, constants={**launch.constants, "BR": 32})
    usage = replace(aot.compile_for(narrow, 90), tall=True)
    assert usage.complaint(90) == "mma products on 64 rows or more, wgmma is wanted"


GROWING = {
    "ragged_attention": lambda size: compiled._ragged_decode(128, torch.bfloat16, pages=40 + size),
    "slot_decode": lambda size: compiled._slot_decode(128, torch.bfloat16, slots=4096 + size),
    "gather_entries": lambda size: compiled._compaction(128, torch.bfloat16, scored=True, kept=1024 + size),
    "hip_enter": lambda size: compiled._hip_enter(32, moved=2 + size, slots=4096 + 32 * size),
    "hip_keep": lambda size: compiled._hip_keep(900 + size),
    "slot_write": lambda size: compiled._slot_write(128, torch.bfloat16, slots=1024 + size),
    "column_votes of a step": lambda size: compiled._column_votes(128, "bf16", width=1, slots=4096 + 512 * size + size),
    "column_votes of a window": lambda size: compiled._column_votes(
        128, "bf16", width=32, slots=4096 + 512 * size + size
    ),
    "block_sparse_attention of a step": lambda size: compiled._block_sparse(
        torch.bfloat16, 128, 16, 8, queries=1, slots=4096 + 128 * size + 8 * size
    ),
}


@pytest.mark.parametrize("op", GROWING)
def test_a_cache_that_grows_needs_no_other_kernel(op: str) -> None:
    kernels = {tuple(aot.fingerprint(launch) for launch in GROWING[op](size)) for size in (0, 1, 8)}
    assert len(kernels) == 1


def test_a_million_tokens_fit_into_a_grid() -> None:
    long, dtypes = 2**20, (torch.float32, torch.bfloat16)
    launches = [
        *(launch for dtype in dtypes for launch in compiled._block_sparse(dtype, 128, 16, 8, queries=long, slots=long)),
        *compiled._column_votes(128, "fp32", width=long, slots=long),
        *compiled._ragged_decode(128, torch.bfloat16, pages=long // 64),
        *compiled._compaction(128, torch.bfloat16, kept=long),
    ]
    assert all(size <= 65535 for launch in launches for size in launch.grid[1:])


def test_steps_have_programs_for_a_large_gpu() -> None:
    """132 multiprocessors; a budget of 2048 entries, and a cache of 32768."""
    for pages, least in ((33, 128), (512, 256)):
        split = compiled._ragged_decode(128, torch.bfloat16, pages=pages)[0]
        assert math.prod(split.grid) >= least


def test_complaints() -> None:
    assert Usage(SHARED_MEMORY[80], 255, 0).complaint(80) is None
    assert "limit of sm_80 is 166912" in str(Usage(SHARED_MEMORY[80] + 1, 32, 0).complaint(80))
    assert Usage(SHARED_MEMORY[80] + 1, 32, 0).complaint(90) is None
    assert Usage(0, 255, 8).complaint(90) == "8 bytes per thread spilled"
    assert Usage(70 * 1024, 150, 0, warps=4).resident(80) == 2 and Usage(70 * 1024, 150, 0, warps=4).resident(90) == 3
    assert Usage(1024, 255, 0, warps=8).resident(90) == 1 and Usage(0, 16, 0, warps=1).resident(80) == 32
    crowded = Usage(120 * 1024, 150, 0, warps=4, together=8)
    assert crowded.complaint(80) == "4 warps on a multiprocessor at once, 8 are wanted"
