"""Compiles every kernel configuration for GPUs that need not be there, and says what it takes of them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_accel.kernels.launch import SHARED_MEMORY, Launch
from tests.kernels.compiled import CONFIGURATIONS

ARCHITECTURES = (80, 90)
# Kernels whose time is that of reading keys and values, and how many tiles of them must be in shared memory at once:
# with one, a program reads and computes by turns.
BUFFERS = {name: 2 for name in ("split_kernel", "slot_split_kernel", "block_sparse_kernel", "col_scores_kernel")}
# Registers, bytes of shared memory and warps of a multiprocessor, by compute capability; a program takes one KiB of
# shared memory beside its own, registers by 256 for a warp.
MULTIPROCESSOR = {80: (65536, 164 * 1024, 64), 90: (65536, 228 * 1024, 64)}
# Warps that must fit on a multiprocessor at once, two for each of its four schedulers, so that one reads while another
# computes: of kernels whose time is that of reading or multiplying, in 16 bits with up to 128 channels.
RESIDENT = dict.fromkeys(BUFFERS, 8)
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        shared: bytes of shared memory per program.
        registers: per thread.
        spilled: bytes per thread that did not fit into registers.
        buffers: tiles of the pipelined loads that are in shared memory at once, the fewest of any of them; 0 where
            nothing is pipelined.
        products: how matrices are multiplied: "wgmma" (Hopper's tensor cores), "mma" (those of all), or "" for neither.
        wanted: buffers that there must be.
        warps: of a program.
        together: warps that must fit on a multiprocessor at once.
        tall: whether Hopper's tensor cores must multiply, which take 64 rows at once.
    """

    shared: int
    registers: int
    spilled: int
    buffers: int = 0
    products: str = ""
    wanted: int = 0
    tall: bool = False
    warps: int = 4
    together: int = 0

    def resident(self, arch: int) -> int:
        """Programs that fit on a multiprocessor at once."""
        registers, shared, warps = MULTIPROCESSOR[arch]
        by_registers = registers // (-(-self.registers * 32 // 256) * 256) // 4 * 4 // self.warps
        return min(by_registers, shared // (self.shared + 1024), warps // self.warps, 32)

    def complaint(self, arch: int) -> str | None:
        """What makes it unfit for this architecture, or None."""
        if self.shared > SHARED_MEMORY[arch]:
            return f"{self.shared} bytes of shared memory, the limit of sm_{arch} is {SHARED_MEMORY[arch]}"
        if self.buffers < self.wanted:
            return f"{self.buffers} tiles in shared memory at once, {self.wanted} are wanted"
        if self.tall and arch >= 90 and self.products != "wgmma":
            return f"{self.products or 'no'} products on 64 rows or more, wgmma is wanted"
        if (resident := self.resident(arch) * self.warps) < self.together:
            return f"{resident} warps on a multiprocessor at once, {self.together} are wanted"
        return f"{self.spilled} bytes per thread spilled" if self.spilled else None


def compiled() -> dict[tuple[str, str], list[Launch]]:
    """(operation, configuration) -> its launches, planned on meta tensors."""
    return {(op, label): plans for op, make in CONFIGURATIONS.items() for label, plans in make().items()}


def fingerprint(launch: Launch) -> str:
    """Equal for launches that compile to the same code."""
    signature, constants, attributes = _source(launch)
    text = repr((launch.kernel.cache_key, signature, constants, attributes, launch.warps, launch.stages))
    return hashlib.sha256(text.encode()).hexdigest()


def compile_for(launch: Launch, arch: int) -> Usage:
    """Compiles one launch for ``sm_<arch>``, with the specialisation that its arguments would get when launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _source(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spilled = _resources(compiled.asm["cubin"])
    products = next((kind for kind in ("wgmma", "mma") if f"{kind}." in compiled.asm["ptx"]), "")
    name = launch.kernel.__name__
    wanted = BUFFERS.get(name, 0) if launch.stages > 2 else 0
    tiles = _buffers(compiled.asm["ttgir"])
    together = RESIDENT.get(name, 0) if _small(launch) else 0
    shared, tall = int(compiled.metadata.shared), _rows(launch) >= 64
    return Usage(shared, registers, spilled, tiles, products, wanted, tall, launch.warps, together)


def _small(launch: Launch) -> bool:
    """Whether entries are of 16 bits and up to 128 channels."""
    given = next(value for value in launch.arguments.values() if isinstance(value, Tensor))
    return given.element_size() == 2 and max(launch.constants.get(name, 0) for name in ("D", "DV")) <= 128


def _rows(launch: Launch) -> int:
    """Rows of the matrices that a kernel multiplies with tensor cores; 0 where it uses none."""
    given = next(value for value in launch.arguments.values() if isinstance(value, Tensor))
    sizes = [launch.constants.get(name, 0) for name in ("BR", "BLOCK_M")]
    rows = max(*sizes, launch.constants.get("PACK", 0) * launch.constants.get("ROWS", 0))
    return rows if given.element_size() == 2 else 0


def _source(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, compile-time constants and alignments as Triton derives them from the arguments of a launch."""
    given: Mapping[str, Any] = {**launch.arguments, **launch.constants}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (_specialised(parameter, value) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and _specialised(parameter, value):
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def _specialised(parameter: Any, value: object) -> bool:
    return isinstance(value, int) and not parameter.do_not_specialize


def _buffers(ttgir: str) -> int:
    """The fewest tiles that any of the pipelined loads of matrices keeps in shared memory at once."""
    counts = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x\w+,", ttgir)
    return min(map(int, counts), default=0)


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread in local memory."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    usage = dict(field.split(":")[:2] for field in line.split() if ":" in field)
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
